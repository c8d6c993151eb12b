// gRPC C++ at its leanest: one thread on one completion queue gives the message of any unary method back.
// Comparator of bench.dataplane: grpc_echo PORT

#include <grpcpp/generic/async_generic_service.h>
#include <grpcpp/grpcpp.h>

#include <string>

namespace {

constexpr int kWaiting = 128;  // calls asked for ahead

class Call {
 public:
  Call(grpc::AsyncGenericService* service, grpc::ServerCompletionQueue* queue) : service_(service), queue_(queue) {
    service_->RequestCall(&context_, &stream_, queue_, queue_, this);
  }

  void Proceed(bool ok) {
    if (step_ == Step::kAsked && ok) {
      new Call(service_, queue_);
      step_ = Step::kReading;
      stream_.Read(&message_, this);
    } else if (step_ == Step::kReading && ok) {
      step_ = Step::kEnding;
      stream_.WriteAndFinish(message_, grpc::WriteOptions(), grpc::Status::OK, this);
    } else if (step_ == Step::kReading) {
      step_ = Step::kEnding;
      stream_.Finish(grpc::Status(grpc::StatusCode::INVALID_ARGUMENT, "a call without a message"), this);
    } else {
      delete this;
    }
  }

 private:
  enum class Step { kAsked, kReading, kEnding };

  grpc::AsyncGenericService* service_;
  grpc::ServerCompletionQueue* queue_;
  grpc::GenericServerContext context_;
  grpc::GenericServerAsyncReaderWriter stream_{&context_};
  grpc::ByteBuffer message_;
  Step step_ = Step::kAsked;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  grpc::AsyncGenericService service;
  grpc::ServerBuilder builder;
  builder.AddListeningPort(std::string("127.0.0.1:") + argv[1], grpc::InsecureServerCredentials());
  builder.RegisterAsyncGenericService(&service);
  std::unique_ptr<grpc::ServerCompletionQueue> queue = builder.AddCompletionQueue();
  std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  if (server == nullptr) return 1;
  for (int n = 0; n < kWaiting; ++n) new Call(&service, queue.get());
  void* call = nullptr;
  for (bool ok = false; queue->Next(&call, &ok);) static_cast<Call*>(call)->Proceed(ok);
}
