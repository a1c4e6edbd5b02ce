// Prunes a safetensors file with a secateur server: the weights with the smallest magnitudes, ranked
// over all tensors together. docs/go.md says how to build it.
//
//	prune [--tensors GLOB] [--output masks|dense] [--token T] [--tls-ca FILE] [--deadline SECONDS]
//	      ADDRESS MODEL FRACTION RESULT
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"math"
	"os"
	"strconv"
	"time"

	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	pb "example.com/prune/secateurpb"
)

const chunkBytes = 1 << 20

var (
	tensors  = flag.String("tensors", "*.weight", "a name or a glob")
	output   = flag.String("output", "masks", "masks or dense")
	token    = flag.String("token", "", "the bearer token")
	tlsCA    = flag.String("tls-ca", "", "a PEM file of authorities; without it the call is not encrypted")
	deadline = flag.Float64("deadline", 60, "seconds")
)

func connect(address string) (*grpc.ClientConn, error) {
	security := grpc.WithInsecure()
	if *tlsCA != "" {
		trusted, err := credentials.NewClientTLSFromFile(*tlsCA, "")
		if err != nil {
			return nil, err
		}
		security = grpc.WithTransportCredentials(trusted)
	}
	// A report is one message: for 40,000 tensors it exceeds gRPC's default limit of 4 MiB.
	anySize := grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(math.MaxInt32))
	return grpc.Dial(address, security, anySize)
}

func headerOf(size int64, fraction float64) *pb.PruneHeader {
	selection := &pb.Selection{
		Tensors:     []string{*tensors},
		Importance:  &pb.Selection_Magnitude{Magnitude: &pb.Magnitude{}},
		Granularity: pb.Granularity_GRANULARITY_ELEMENT,
		Scope:       pb.Scope_SCOPE_GLOBAL,
		Amount:      &pb.Selection_Fraction{Fraction: fraction},
	}
	rule := &pb.Rule{Method: &pb.Rule_Selection{Selection: selection}}
	outputs := map[string]pb.Output{"masks": pb.Output_OUTPUT_MASKS, "dense": pb.Output_OUTPUT_DENSE}
	return &pb.PruneHeader{
		DataBytes: uint64(size),
		Spec:      &pb.PruningSpec{Rules: []*pb.Rule{rule}},
		Output:    outputs[*output],
	}
}

// send sends the header alone, then the file, cut anywhere. An error of Send means that the call
// has ended: receive returns the reason.
func send(call pb.Pruner_PruneClient, header *pb.PruneHeader, model io.Reader) error {
	err := call.Send(&pb.PruneRequest{Header: header})
	for chunk := make([]byte, chunkBytes); err == nil; {
		n, readErr := model.Read(chunk)
		if n > 0 {
			err = call.Send(&pb.PruneRequest{Data: chunk[:n]})
		}
		if readErr == io.EOF {
			return call.CloseSend()
		}
		if readErr != nil {
			return readErr
		}
	}
	return nil
}

// receive writes the data of all messages, joined, which is a file. The first message has the report.
func receive(call pb.Pruner_PruneClient, file io.Writer) (*pb.SparsityReport, error) {
	var report *pb.SparsityReport
	for {
		answer, err := call.Recv()
		if err == io.EOF {
			return report, nil
		}
		if err != nil {
			return nil, err
		}
		if answer.Result != nil {
			report = answer.Result.Report
		}
		if _, err := file.Write(answer.Data); err != nil {
			return nil, err
		}
	}
}

func prune(address, path string, fraction float64, file io.Writer) (*pb.SparsityReport, error) {
	model, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer model.Close()
	info, err := model.Stat()
	if err != nil {
		return nil, err
	}
	connection, err := connect(address)
	if err != nil {
		return nil, err
	}
	defer connection.Close()
	ctx, cancel := context.WithTimeout(
		context.Background(), time.Duration(*deadline*float64(time.Second)))
	defer cancel()
	if *token != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+*token)
	}
	call, err := pb.NewPrunerClient(connection).Prune(ctx)
	if err != nil {
		return nil, err
	}
	// The server answers when it has the whole model, so sending everything first cannot deadlock.
	if err := send(call, headerOf(info.Size(), fraction), model); err != nil {
		return nil, err
	}
	return receive(call, file)
}

func run(address, model, amount, result string) error {
	fraction, err := strconv.ParseFloat(amount, 64)
	if err != nil {
		return err
	}
	part, err := os.Create(result + ".part")
	if err != nil {
		return err
	}
	defer os.Remove(part.Name()) // fails after the file got its name
	report, err := prune(address, model, fraction, part)
	if closeErr := part.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		err = os.Rename(part.Name(), result) // whole, or not at all
	}
	if err != nil {
		return err
	}
	fmt.Printf("{\"zeros\": %d, \"total\": %d}\n", report.Zeros, report.Total)
	return nil
}

func main() {
	flag.Parse()
	if flag.NArg() != 4 {
		fmt.Fprintln(os.Stderr, "wrong arguments: see the first lines")
		os.Exit(2)
	}
	if err := run(flag.Arg(0), flag.Arg(1), flag.Arg(2), flag.Arg(3)); err != nil {
		if failed, ok := status.FromError(err); ok {
			fmt.Fprintf(os.Stderr, "%s: %s\n", code.Code(failed.Code()), failed.Message())
		} else {
			fmt.Fprintln(os.Stderr, err)
		}
		os.Exit(1)
	}
}
