#pragma once
#include <string>

namespace krait::comm {

/// Listens at the port of every address of this host. Error if it is taken.
int listen_at(int port);
/// Connects to rank 0's server, which may come later, within `seconds`. Error that says what was found there.
int connect_to(const std::string& host, int port, double seconds);
/// Small messages go at once; a machine that vanishes without a word is seen as gone after 25 s.
void prepare(int socket);

}  // namespace krait::comm
