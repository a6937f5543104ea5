// Runs a package of s2o_compile.package from C++: token ids in, logits out. Neither Python nor s2o_compile is needed.
//
//   run_package model.pt2 --tokens ids.i64 [--out logits.f32]     int64 numbers, as numpy's tofile writes them
//   run_package model.pt2 --length 8192 [--vocabulary 49152]      random ids
//
// A package made on CUDA takes its input on CUDA: add --cuda.

#include <cstdint>
#include <chrono>
#include <fstream>
#include <iostream>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

namespace {

torch::Tensor read_tokens(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) {
    throw std::runtime_error("expected a file of int64 token ids, got " + path + ", which cannot be read");
  }
  const auto bytes = static_cast<std::int64_t>(file.tellg());
  if (bytes == 0 || bytes % 8 != 0) {
    throw std::runtime_error("expected int64 token ids, got " + std::to_string(bytes) + " bytes in " + path);
  }
  auto tokens = torch::empty({1, bytes / 8}, torch::kInt64);
  file.seekg(0).read(static_cast<char*>(tokens.data_ptr()), bytes);
  return tokens;
}

void write_logits(const torch::Tensor& logits, const std::string& path) {
  const auto values = logits.to(torch::kCPU, torch::kFloat32).contiguous();
  std::ofstream(path, std::ios::binary).write(static_cast<const char*>(values.data_ptr()), values.nbytes());
}

std::map<std::string, std::string> read_options(int argc, char** argv) {
  std::map<std::string, std::string> options;
  for (int at = 2; at < argc; ++at) {
    const std::string name = argv[at];
    options[name] = name == "--cuda" ? "" : at + 1 < argc ? argv[++at] : throw std::runtime_error(name + " needs a value");
  }
  return options;
}

void run(int argc, char** argv) {
  if (argc < 2) {
    throw std::runtime_error("usage: run_package model.pt2 (--tokens FILE | --length N) [--out FILE] [--cuda]");
  }
  auto options = read_options(argc, argv);
  const auto vocabulary = options.count("--vocabulary") ? std::stoll(options["--vocabulary"]) : 49152;
  const auto length = options.count("--length") ? std::stoll(options["--length"]) : 1024;
  auto tokens = options.count("--tokens") ? read_tokens(options["--tokens"])
                                          : torch::randint(vocabulary, {1, length}, torch::kInt64);
  if (options.count("--cuda")) {
    tokens = tokens.to(torch::kCUDA);
  }

  c10::InferenceMode inference;
  torch::inductor::AOTIModelPackageLoader loader(argv[1]);
  const auto start = std::chrono::steady_clock::now();
  const auto logits = loader.run({tokens}).at(0);
  const auto last = logits.select(1, logits.size(1) - 1).argmax(-1).item<std::int64_t>();  // waits for the device
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;

  std::cout << tokens.size(1) << " tokens, logits " << logits.sizes() << ", next token " << last << ", "
            << seconds.count() << " s\n";
  if (options.count("--out")) {
    write_logits(logits, options["--out"]);
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(argc, argv);
  } catch (const std::exception& error) {
    std::cerr << "run_package: " << error.what() << "\n";
    return 1;
  }
  return 0;
}
