#include "core/config_node.h"
#include "core/error.h"
#include "data/fetch.h"

// Where the data sets are, and their checksums.
namespace krait::data {
namespace {

FetchSource mnist_file(const std::string& name, int64_t packed_bytes, const std::string& packed, int64_t bytes,
                       const std::string& sha256) {
  return {.file = name + ".gz",
          .urls = {"https://ossci-datasets.s3.amazonaws.com/mnist/" + name + ".gz",
                   "https://storage.googleapis.com/cvdf-datasets/mnist/" + name + ".gz"},
          .sha256 = packed,
          .bytes = packed_bytes,
          .pack = FetchSource::Pack::gzip,
          .members = {{.name = name, .inside = "", .sha256 = sha256, .bytes = bytes}}};
}

std::vector<FetchMember> cifar10_members() {
  std::vector<FetchMember> members;
  const auto add = [&](const std::string& name) {
    members.push_back({.name = name, .inside = name, .bytes = 30730000});
  };
  for (int i = 1; i <= 5; ++i) add(fmt::format("cifar-10-batches-bin/data_batch_{}.bin", i));
  add("cifar-10-batches-bin/test_batch.bin");
  return members;
}

std::vector<FetchSet> make_sets() {
  return {
      {.name = "mnist",
       .folder = "mnist",
       .terms = "LeCun, Cortes, Burges; commonly quoted as CC BY-SA 3.0",
       .sources = {mnist_file("train-images-idx3-ubyte", 9912422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
                              47040016, "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
                   mnist_file("train-labels-idx1-ubyte", 28881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
                              60008, "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
                   mnist_file("t10k-images-idx3-ubyte", 1648877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
                              7840016, "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
                   mnist_file("t10k-labels-idx1-ubyte", 4542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
                              10008, "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2")}},
      {.name = "cifar10",
       .folder = "cifar10",
       .terms = "Krizhevsky 2009; the authors ask to be cited",
       .sources = {{.file = "cifar-10-binary.tar.gz",
                    .urls = {"https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"},
                    .sha256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
                    .bytes = 170052171,
                    .pack = FetchSource::Pack::tar_gz,
                    .members = cifar10_members()}}},
      {.name = "shakespeare",
       .folder = "tinyshakespeare",
       .terms = "public domain",
       .sources = {{.file = "input.txt",
                    .urls = {"https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"},
                    .sha256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
                    .bytes = 1115394,
                    .members = {{.name = "input.txt", .inside = "",
                                 .sha256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
                                 .bytes = 1115394}}}}},
      {.name = "wikitext-2",
       .folder = "wikitext-2",
       .terms = "CC BY-SA 3.0 and GFDL; keep the notice with copies",
       .sources = {{.file = "wikitext-2-v1.zip",
                    .urls = {"https://wikitext.smerity.com/wikitext-2-v1.zip",
                             "https://s3.amazonaws.com/research.metamind.io/wikitext/wikitext-2-v1.zip"},
                    .sha256 = "92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c",
                    .bytes = 4475746,
                    .pack = FetchSource::Pack::zip,
                    .members = {{"wiki.train.tokens", "wikitext-2/wiki.train.tokens",
                                 "9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f", 10797148},
                                {"wiki.valid.tokens", "wikitext-2/wiki.valid.tokens",
                                 "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8", 1121681},
                                {"wiki.test.tokens", "wikitext-2/wiki.test.tokens",
                                 "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0", 1256449}}}}},
      {.name = "wikitext-103",
       .folder = "wikitext-103",
       .terms = "CC BY-SA 3.0 and GFDL; keep the notice with copies",
       .sources = {{.file = "wikitext-103-v1.zip",
                    .urls = {"https://wikitext.smerity.com/wikitext-103-v1.zip",
                             "https://s3.amazonaws.com/research.metamind.io/wikitext/wikitext-103-v1.zip"},
                    .sha256 = "242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590",
                    .bytes = 190229076,
                    .pack = FetchSource::Pack::zip,
                    .members = {{"wiki.train.tokens", "wikitext-103/wiki.train.tokens"},
                                {"wiki.valid.tokens", "wikitext-103/wiki.valid.tokens"},
                                {"wiki.test.tokens", "wikitext-103/wiki.test.tokens"}}}}},
  };
}

}  // namespace

const std::vector<FetchSet>& fetch_sets() {
  static const std::vector<FetchSet> sets = make_sets();
  return sets;
}

const FetchSet& find_fetch_set(const std::string& name) {
  std::string names;
  for (const FetchSet& set : fetch_sets()) {
    if (set.name == name) return set;
    names += (names.empty() ? "" : ", ") + set.name;
  }
  throw ConfigError(fmt::format("data set '{}' is unknown; choose one of {}", name, names));
}

}  // namespace krait::data
