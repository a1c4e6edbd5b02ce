// Prunes a model by the statistics of its layers' inputs: Wanda, and a refit of the kept weights.
//
//   node calibrated.js ADDRESS MODEL STATISTICS FRACTION RESULT
//
// STATISTICS is a file as docs/statistics.md describes it, with Gram matrices (`NAME.gram`).
const { readFileSync, createWriteStream } = require('node:fs');
const { Readable } = require('node:stream');
const { pipeline } = require('node:stream/promises');
const grpc = require('@grpc/grpc-js');
const protoLoader = require('@grpc/proto-loader');

const CHUNK = 1 << 20;

// The tensors of a safetensors file: for each name its dtype, shape and bytes.
function readTensors(path) {
  const file = readFileSync(path);
  const begin = 8 + Number(file.readBigUInt64LE());
  const { __metadata__: metadata = {}, ...entries } = JSON.parse(file.subarray(8, begin));
  const tensors = {};
  for (const [name, { dtype, shape, data_offsets: [from, to] }] of Object.entries(entries)) {
    tensors[name] = { dtype, shape, bytes: file.subarray(begin + from, begin + to) };
  }
  return { tensors, metadata };
}

// The pieces of a safetensors file of tensors in their order.
function fileOf(tensors, metadata) {
  const header = { __metadata__: metadata };
  let end = 0;
  for (const [name, { dtype, shape, bytes }] of Object.entries(tensors)) {
    header[name] = { dtype, shape, data_offsets: [end, (end += bytes.length)] };
  }
  const text = Buffer.from(JSON.stringify(header));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(text.length));
  return [length, text, ...Object.values(tensors).map(({ bytes }) => bytes)];
}

// The factor of each input: the root of its mean square, in float32.
function factorsOf(statistics, name) {
  const { bytes } = statistics[`${name}.sum_squares`];
  const { dtype, bytes: one } = statistics[`${name}.count`];
  const count = dtype === 'F64' ? one.readDoubleLE() : Number(one.readBigInt64LE());
  const inputs = bytes.length / 8;
  const factors = Buffer.alloc(4 * inputs);
  for (let i = 0; i < inputs; i++) {
    factors.writeFloatLE(Math.sqrt(bytes.readDoubleLE(8 * i) / count), 4 * i);
  }
  return { dtype: 'F32', shape: [inputs], bytes: factors };
}

function requestOf(model, statisticsFile, fraction) {
  const { tensors: statistics, metadata } = readTensors(statisticsFile);
  const described = JSON.parse(metadata['secateur.statistics']).layers ?? {};
  const names = Object.keys(statistics).filter((key) => key.endsWith('.sum_squares'))
    .map((key) => key.slice(0, -'.sum_squares'.length))
    .filter((name) => name in model.tensors && (described[name]?.input_dim ?? 1) === 1);
  const tensors = { ...model.tensors };
  const inputs = {};
  const grams = {};
  for (const name of names) {
    inputs[name] = `factors of ${name}`;
    tensors[inputs[name]] = factorsOf(statistics, name);
  }
  for (const name of names) { // Gram matrices lie behind all other tensors, each once
    const owner = described[name]?.gram ?? name;
    grams[name] = { holder: `gram of ${owner}` };
    tensors[grams[name].holder] = statistics[`${owner}.gram`];
  }
  const selection = {
    tensors: names, activation: { inputs }, granularity: 'GRANULARITY_ELEMENT',
    scope: 'SCOPE_PER_ROW', fraction,
  };
  const solver = { tensors: names, grams, refit: {} };
  const file = fileOf(tensors, model.metadata);
  const header = {
    data_bytes: file.reduce((size, piece) => size + piece.length, 0),
    spec: { rules: [{ selection }, { solver }] },
    output: 'OUTPUT_DENSE',
  };
  return { header, file };
}

function* messages({ header, file }) {
  yield { header };
  for (const piece of file) {
    for (let begin = 0; begin < piece.length; begin += CHUNK) {
      yield { data: piece.subarray(begin, begin + CHUNK) };
    }
  }
}

async function main(address, modelFile, statisticsFile, fraction, result) {
  const definition = protoLoader.loadSync('secateur/v1/pruner.proto', {
    includeDirs: ['protos'], keepCase: true, longs: Number, enums: String, defaults: true,
  });
  const { Pruner } = grpc.loadPackageDefinition(definition).secateur.v1;
  const anySize = { 'grpc.max_receive_message_length': -1 };
  const pruner = new Pruner(address, grpc.credentials.createInsecure(), anySize);
  const request = requestOf(readTensors(modelFile), statisticsFile, Number(fraction));
  const call = pruner.Prune(new grpc.Metadata(), { deadline: Date.now() + 600_000 });
  await pipeline(Readable.from(messages(request)), call, async function* data(answer) {
    for await (const { result: first, data: part } of answer) {
      if (first) console.log(`${first.report.zeros} of ${first.report.total} are pruned`);
      yield part;
    }
  }, createWriteStream(result));
  pruner.close();
}

main(...process.argv.slice(2)).catch(({ code, details, message }) => {
  console.error(details ? `${grpc.status[code]}: ${details}` : message);
  process.exit(1);
});
