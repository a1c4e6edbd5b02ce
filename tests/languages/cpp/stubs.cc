// All stubs in one unit: to read the headers of gRPC and protobuf takes most of the build's time.
// The generated files have static variables of the same names, so each gets names of its own.

#define schemas checkpoint_schemas
#define file_default_instances checkpoint_instances
#include "secateur/v1/checkpoint.pb.cc"
#undef schemas
#undef file_default_instances

#define schemas plan_schemas
#define file_default_instances plan_instances
#include "secateur/v1/plan.pb.cc"
#undef schemas
#undef file_default_instances

#define schemas report_schemas
#define file_default_instances report_instances
#include "secateur/v1/report.pb.cc"
#undef schemas
#undef file_default_instances

#define schemas spec_schemas
#define file_default_instances spec_instances
#include "secateur/v1/spec.pb.cc"
#undef schemas
#undef file_default_instances

#include "secateur/v1/pruner.pb.cc"

#include "secateur/v1/pruner.grpc.pb.cc"
