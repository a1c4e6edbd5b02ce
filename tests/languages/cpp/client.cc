// Prunes a safetensors file with a secateur server: the weights with the smallest magnitudes, ranked
// over all tensors together. It depends on protos/secateur/v1 alone.
//
//   client [--tensors GLOB] [--output masks|dense] [--token T] [--deadline SECONDS]
//          ADDRESS MODEL FRACTION RESULT

#include <absl/status/status.h>
#include <getopt.h>
#include <grpcpp/grpcpp.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <memory>
#include <stdexcept>
#include <string>

#include "secateur/v1/pruner.grpc.pb.h"

namespace v1 = secateur::v1;

namespace {

constexpr std::size_t kChunkBytes = 1 << 20;

struct Arguments {
  std::string tensors = "*.weight";
  v1::Output output = v1::OUTPUT_MASKS;
  std::string token;
  double deadline = 60;
  std::string address, model, fraction, result;
};

v1::PruneHeader header_of(const Arguments& arguments) {
  v1::PruneHeader header;
  header.set_data_bytes(std::filesystem::file_size(arguments.model));
  header.set_output(arguments.output);
  v1::Selection& selection = *header.mutable_spec()->add_rules()->mutable_selection();
  selection.add_tensors(arguments.tensors);
  selection.mutable_magnitude();
  selection.set_granularity(v1::GRANULARITY_ELEMENT);
  selection.set_scope(v1::SCOPE_GLOBAL);
  selection.set_fraction(std::stod(arguments.fraction));
  return header;
}

void set_options(grpc::ClientContext& context, const Arguments& arguments) {
  if (!arguments.token.empty()) {
    context.AddMetadata("authorization", "Bearer " + arguments.token);
  }
  const std::chrono::duration<double> seconds(arguments.deadline);
  context.set_deadline(std::chrono::system_clock::now() +
                       std::chrono::duration_cast<std::chrono::milliseconds>(seconds));
}

using Call = grpc::ClientReaderWriter<v1::PruneRequest, v1::PruneResponse>;

// Sends the header alone, then the file, cut anywhere. Write waits while the server accepts no
// more, and returns false when the call has ended: Finish has the reason.
void send(Call& call, const v1::PruneHeader& header, const std::string& path) {
  v1::PruneRequest request;
  *request.mutable_header() = header;
  std::ifstream model(path, std::ios::binary);
  std::string chunk(kChunkBytes, '\0');
  while (call.Write(request)) {
    request.Clear();
    model.read(chunk.data(), chunk.size());
    if (model.gcount() == 0) break;
    request.set_data(chunk.data(), model.gcount());
  }
  call.WritesDone();
}

// The first message has the report; the data of all messages, joined, is the file.
v1::SparsityReport receive(Call& call, const std::string& path) {
  std::ofstream file;
  file.exceptions(std::ios::failbit | std::ios::badbit);
  file.open(path, std::ios::binary);
  v1::SparsityReport report;
  v1::PruneResponse answer;
  while (call.Read(&answer)) {
    if (answer.has_result()) report = answer.result().report();
    file << answer.data();
  }
  return report;
}

std::runtime_error failure(const grpc::Status& status) {
  const auto code = static_cast<absl::StatusCode>(status.error_code());  // the same numbers
  return std::runtime_error(absl::StatusCodeToString(code) + ": " + status.error_message());
}

std::shared_ptr<grpc::Channel> connect(const std::string& address) {
  grpc::ChannelArguments options;
  // A report is one message: for 40,000 tensors it exceeds gRPC's default limit of 4 MiB.
  options.SetMaxReceiveMessageSize(-1);
  // Over a network use grpc::SslCredentials({}), else others can read the token.
  return grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), options);
}

// The server answers when it has the whole model, so sending everything before receiving cannot
// deadlock.
v1::SparsityReport prune(const Arguments& arguments, const std::string& part) {
  const v1::PruneHeader header = header_of(arguments);
  auto pruner = v1::Pruner::NewStub(connect(arguments.address));
  grpc::ClientContext context;
  set_options(context, arguments);
  auto call = pruner->Prune(&context);
  send(*call, header, arguments.model);
  const v1::SparsityReport report = receive(*call, part);
  const grpc::Status status = call->Finish();
  if (!status.ok()) throw failure(status);
  return report;
}

v1::Output output_of(const std::string& name) {
  if (name == "masks") return v1::OUTPUT_MASKS;
  if (name == "dense") return v1::OUTPUT_DENSE;
  throw std::invalid_argument("--output is masks or dense, not " + name);
}

Arguments parse(int argc, char** argv) {
  const option options[] = {{"tensors", required_argument, nullptr, 't'},
                            {"output", required_argument, nullptr, 'o'},
                            {"token", required_argument, nullptr, 'k'},
                            {"deadline", required_argument, nullptr, 'd'},
                            {}};
  Arguments given;
  for (int letter; (letter = getopt_long(argc, argv, "", options, nullptr)) != -1;) {
    if (letter == 't') given.tensors = optarg;
    if (letter == 'o') given.output = output_of(optarg);
    if (letter == 'k') given.token = optarg;
    if (letter == 'd') given.deadline = std::stod(optarg);
    if (letter == '?') throw std::invalid_argument("wrong arguments: see the first lines");
  }
  if (argc - optind != 4) throw std::invalid_argument("wrong arguments: see the first lines");
  for (std::string* to : {&given.address, &given.model, &given.fraction, &given.result}) {
    *to = argv[optind++];
  }
  return given;
}

void run(const Arguments& arguments) {
  const std::string part = arguments.result + ".part";
  try {
    const v1::SparsityReport report = prune(arguments, part);
    std::filesystem::rename(part, arguments.result);  // whole, or not at all
    std::cout << "{\"zeros\":" << report.zeros() << ",\"total\":" << report.total() << "}\n";
  } catch (...) {
    std::filesystem::remove(part);
    throw;
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(parse(argc, argv));
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
  return 0;
}
