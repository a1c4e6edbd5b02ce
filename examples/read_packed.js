// Reads a packed file of secateur: docs/packed.md describes the layout.
//
//   node read_packed.js packed.safetensors
//
// prints a line for each tensor: name, dtype, shape, and the SHA-256 of its dense bytes. Node from 22.15
// on has zstd; before that, npm install fzstd.

const crypto = require("node:crypto");
const fs = require("node:fs");
const zlib = require("node:zlib");

const decompress = zlib.zstdDecompressSync ?? require("fzstd").decompress;
const BLOCK = 1 << 18;
const BITS = { BOOL: 8, U8: 8, I8: 8, I16: 16, U16: 16, F16: 16, BF16: 16, I32: 32, U32: 32, F32: 32 };
Object.assign(BITS, { F64: 64, I64: 64, U64: 64, C64: 64, F8_E4M3: 8, F8_E5M2: 8 });

function main(path) {
  const file = fs.openSync(path);
  const { header, begin } = readHeader(file);
  const metadata = header.__metadata__ ?? {};
  const packed = JSON.parse(metadata["secateur.packed"] ?? '{"version":1,"tensors":{}}');
  if (packed.version !== 1) throw new Error(`unknown version ${packed.version}`);
  for (const [name, entry] of Object.entries(header)) {
    if (name === "__metadata__") continue;
    const [first, last] = entry.data_offsets;
    const stored = read(file, begin + first, last - first);
    const [dtype, shape] = packed.tensors[name] ?? [entry.dtype, entry.shape];
    const dense = name in packed.tensors ? unpack(stored, dtype, shape) : stored;
    const digest = crypto.createHash("sha256").update(dense).digest("hex");
    console.log(JSON.stringify([name, dtype, shape, digest]));
  }
}

function readHeader(file) {
  const length = Number(read(file, 0, 8).readBigUInt64LE());
  return { header: JSON.parse(read(file, 8, length).toString()), begin: 8 + length };
}

function read(file, position, length) {
  const data = Buffer.alloc(length);
  fs.readSync(file, data, 0, length, position);
  return data;
}

// The table of the lengths of frames, then the frames, one for each block.
function unpack(stored, dtype, shape) {
  const width = BITS[dtype] / 8;
  const elements = shape.reduce((product, size) => product * size, 1);
  const dense = Buffer.alloc(elements * width);
  const blocks = Math.ceil(elements / BLOCK);
  let position = 4 * blocks;
  for (let block = 0; block < blocks; block++) {
    const length = stored.readUInt32LE(4 * block);
    const frame = stored.subarray(position, position + length);
    const from = block * BLOCK;
    const count = Math.min(BLOCK, elements - from);
    unpackBlock(decompress(frame), count, width, dense.subarray(from * width, (from + count) * width));
    position += length;
  }
  return dense;
}

// The mask, the signs of the other elements if there are any, then the planes of bytes.
function unpackBlock(data, count, width, dense) {
  const maskBytes = Math.ceil(count / 8);
  const bit = (at, index) => (data[at + (index >> 3)] >> (index & 7)) & 1;
  let kept = 0;
  for (let index = 0; index < count; index++) kept += bit(0, index);
  const planes = data.length - kept * width;
  const hasSigns = planes > maskBytes;
  let value = 0;
  let zero = 0;
  for (let index = 0; index < count; index++) {
    if (bit(0, index)) {
      for (let place = 0; place < width; place++) {
        dense[index * width + place] = data[planes + place * kept + value];
      }
      value++;
    } else {
      if (hasSigns && bit(maskBytes, zero)) dense[index * width + width - 1] = 0x80;
      zero++;
    }
  }
}

main(process.argv[2]);
