#include <cstdio>
#include <memory>

#include "data/fetch.h"
#include "data/inspect.h"
#include "data/prepare.h"
#include "train/cli.h"
#include "train/cli_checks.h"

namespace krait::train::cli {
namespace {

void add_prepare(CLI::App& data, Action& action) {
  const auto o = std::make_shared<data::PrepareOptions>();
  CLI::App* sub = data.add_subcommand("prepare", "Text, many text files, JSON lines or token ids to a token store");
  sub->add_option("INPUT", o->inputs, "Files, directories, or - for standard input")->required();
  sub->add_option("-o,--output", o->output, "The token store (.h5)")->required();
  sub->add_flag("--overwrite", o->overwrite, "Replace an existing output");
  sub->add_option("--format", o->format, "What the inputs are; uint16, uint32: token ids of another program")
      ->check(one_of({"auto", "text", "jsonl", "uint16", "uint32"}))
      ->capture_default_str();
  sub->add_option("--field", o->field, "The text's name in a JSON line")->capture_default_str();
  sub->add_option("--document-separator", o->document_separator,
                  "Ends a document of a text file (\\n, \\f, \\t, \\xHH are understood) [one document a file]");
  sub->add_option("--tokenizer", o->tokenizer, "How text becomes tokens")
      ->check(one_of({"byte", "char", "sentencepiece", "ids"}))
      ->capture_default_str();
  sub->add_option("--tokenizer-from", o->tokenizer_from, "Use the tokenizer of this token store");
  sub->add_option_function<int64_t>("--vocab-size", [o](const int64_t& size) { o->vocab_size = size; },
                                    "sentencepiece [8192]; ids [the largest + 1]")->check(positive());
  sub->add_option_function<int64_t>("--eos-id", [o](const int64_t& id) { o->eos_id = id; },
                                    "ids: the one that ends a document [a document is a file]")->check(not_negative());
  sub->add_option_function<int64_t>("--skip-bytes", [o](const int64_t& bytes) { o->skip_bytes = bytes; },
                                    "ids: a header in front of each file [0]")->check(not_negative());
  sub->add_option("--model", o->model, "sentencepiece")->check(one_of({"unigram", "bpe"}))->capture_default_str();
  sub->add_flag("--byte-fallback,!--no-byte-fallback", o->byte_fallback, "sentencepiece: rare characters as bytes");
  sub->add_option("--sample-bytes", o->sample_bytes, "sentencepiece: text that is trained on")
      ->check(positive())
      ->capture_default_str();
  sub->add_flag_function("--eos,!--no-eos", [o](int64_t count) { o->eos = count > 0; },
                         "End documents with the end-of-text token [when there are several]");
  sub->add_option_function<double>("--valid", [o](const double& share) { o->valid = share; }, "Share held out [0.1]")
      ->check(from_to(0, 1));
  sub->add_option("--test", o->test, "Share held out for the final test")->check(from_to(0, 1))->capture_default_str();
  sub->add_option("--seed", o->seed, "Which documents are held out")->check(from_to(0, 0x1p64))->capture_default_str();
  sub->add_option("--valid-file", o->valid_files, "Taken whole, instead of a share");
  sub->add_option("--test-file", o->test_files, "Taken whole, instead of a share");
  sub->add_flag("-q,--quiet", o->quiet, "No progress");
  sub->callback([o, &action] {
    action = [o] {
      std::fputs(data::to_string(data::prepare(*o)).c_str(), stdout);
      return 0;
    };
  });
}

void add_inspect(CLI::App& data, Action& action) {
  struct Options {
    std::string file;
    int64_t tokens = 40;
  };
  const auto o = std::make_shared<Options>();
  CLI::App* sub = data.add_subcommand("inspect", "What a token store holds; verifies all of it");
  sub->add_option("FILE", o->file, "Token store (.h5)")->required();
  sub->add_option("--tokens", o->tokens, "Tokens of each split to show")->check(not_negative())->capture_default_str();
  sub->callback([o, &action] {
    action = [o] {
      std::fputs(data::inspect(o->file, o->tokens).c_str(), stdout);
      return 0;
    };
  });
}

void add_fetch(CLI::App& data, Action& action) {
  struct Options : data::FetchOptions {
    std::string name;
  };
  const auto o = std::make_shared<Options>();
  std::vector<std::string> names;
  for (const data::FetchSet& set : data::fetch_sets()) names.push_back(set.name);
  CLI::App* sub = data.add_subcommand("fetch", "Download a public data set: checked, unpacked, resumable");
  sub->add_option("NAME", o->name, "The data set")->required()->check(one_of(names));
  sub->add_option("--mirror", o->mirror, "A directory or URL to take the files from instead of the public source");
  sub->add_option("-o,--output", o->directory, "Where the set's folder goes [$KRAIT_DATA_DIR, or data]");
  sub->add_flag("-q,--quiet", o->quiet, "No progress");
  sub->callback([o, &action] {
    action = [o] {
      const data::FetchSet& set = data::find_fetch_set(o->name);
      std::fputs(data::to_string(set, data::fetch(set, *o)).c_str(), stdout);
      return 0;
    };
  });
}

}  // namespace

void add_data(CLI::App& app, Action& action) {
  CLI::App* sub = app.add_subcommand("data", "Get data, make and look at token stores");
  sub->require_subcommand(1);
  add_fetch(*sub, action);
  add_prepare(*sub, action);
  add_inspect(*sub, action);
}

}  // namespace krait::train::cli
