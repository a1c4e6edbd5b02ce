#!/usr/bin/env node
// Prunes a safetensors file with a secateur server: the weights with the smallest magnitudes, ranked
// over all tensors together. It depends on protos/secateur/v1 alone.
//
//   node client.js [--tensors GLOB] [--output masks|dense] [--token T] [--deadline SECONDS]
//                  ADDRESS MODEL FRACTION RESULT
'use strict';

const { createReadStream } = require('node:fs');
const { open, rename, rm, stat } = require('node:fs/promises');
const path = require('node:path');
const { Readable } = require('node:stream');
const { pipeline } = require('node:stream/promises');
const { parseArgs } = require('node:util');
const grpc = require('@grpc/grpc-js');
const protoLoader = require('@grpc/proto-loader');

const CHUNK_BYTES = 1 << 20;
const PROTOS = path.join(__dirname, '../../../protos');
// A report is one message: for 40,000 tensors it exceeds gRPC's default limit of 4 MiB.
const ANY_SIZE = { 'grpc.max_receive_message_length': -1 };
const OUTPUTS = { masks: 'OUTPUT_MASKS', dense: 'OUTPUT_DENSE' };
const OPTIONS = {
  tensors: { type: 'string', default: '*.weight' },
  output: { type: 'string', default: 'masks' },
  token: { type: 'string' },
  deadline: { type: 'string', default: '60' },
};

function connect(address) {
  const definition = protoLoader.loadSync('secateur/v1/pruner.proto', {
    includeDirs: [PROTOS],
    keepCase: true, // field names as in the .proto
    longs: Number, // exact up to 2^53, which no model reaches
    enums: String,
    defaults: true, // a field that is 0 is not on the wire
  });
  const { Pruner } = grpc.loadPackageDefinition(definition).secateur.v1;
  // Over a network use grpc.credentials.createSsl(), else others can read the token.
  return new Pruner(address, grpc.credentials.createInsecure(), ANY_SIZE);
}

function headerOf(dataBytes, tensors, fraction, output) {
  const selection = {
    tensors: [tensors],
    magnitude: {},
    granularity: 'GRANULARITY_ELEMENT',
    scope: 'SCOPE_GLOBAL',
    fraction,
  };
  return { data_bytes: dataBytes, spec: { rules: [{ selection }] }, output: OUTPUTS[output] };
}

// The header is sent alone and first; then the file, cut anywhere.
async function* requests(header, model) {
  yield { header };
  for await (const data of createReadStream(model, { highWaterMark: CHUNK_BYTES })) yield { data };
}

// The first message has the report; the data of all messages, joined, is the file.
async function receive(answer, file) {
  let report;
  for await (const { result, data } of answer) {
    report ??= result.report;
    await file.writeFile(data);
  }
  return report;
}

async function prune(pruner, header, model, file, { token, deadline }) {
  const metadata = new grpc.Metadata();
  if (token) metadata.set('authorization', `Bearer ${token}`);
  const call = pruner.Prune(metadata, { deadline: Date.now() + 1000 * deadline });
  let report;
  // A pipeline reads the model and the answer only as fast as the other end accepts them.
  await pipeline(Readable.from(requests(header, model)), call, async (answer) => {
    report = await receive(answer, file);
  });
  return report;
}

async function main() {
  const { values, positionals } = parseArgs({ options: OPTIONS, allowPositionals: true });
  const [address, model, fraction, result] = positionals;
  if (!result || !OUTPUTS[values.output]) throw new Error('wrong arguments: see the first lines');
  const { size } = await stat(model);
  const header = headerOf(size, values.tensors, Number(fraction), values.output);
  const pruner = connect(address);
  const part = `${result}.part`;
  const file = await open(part, 'w');
  try {
    const { zeros, total } = await prune(pruner, header, model, file, values);
    await rename(part, result); // whole, or not at all
    console.log(JSON.stringify({ zeros, total }));
  } finally {
    await file.close();
    await rm(part, { force: true });
    pruner.close();
  }
}

main().catch(({ code, details, message }) => {
  // A failed call has a code, and the server's message in `details`.
  console.error(details ? `${grpc.status[code]}: ${details}` : message);
  process.exitCode = 1;
});
