// abi -- an inferlet's end of the connection: with no library, all of it follows from docs/abi.md.
import fs from 'node:fs';
import net from 'node:net';

// --- msgpack, as much of it as the ABI needs ----------------------------------------------------

const word = (tag, n) => Buffer.of(tag, n >>> 24, n >>> 16, n >>> 8, n); // a tag and 32 bits

function encode(value) { // null, booleans, integers of 32 bits, strings, buffers, arrays of them
  if (value === null) return Buffer.of(0xc0);
  if (typeof value === 'boolean') return Buffer.of(value ? 0xc3 : 0xc2);
  if (typeof value === 'number')
    return value >= 0 && value < 0x80 ? Buffer.of(value) : word(value < 0 ? 0xd2 : 0xce, value);
  if (Array.isArray(value)) return Buffer.concat([word(0xdd, value.length), ...value.map(encode)]);
  const octets = Buffer.from(value);
  return Buffer.concat([word(typeof value === 'string' ? 0xdb : 0xc6, octets.length), octets]);
}

function decode(octets) {
  let at = 0;
  const uint = (size) => size < 8 ? octets.readUIntBE((at += size) - size, size)
    : Number(octets.readBigUInt64BE((at += 8) - 8));
  const int = (size) => size < 8 ? octets.readIntBE((at += size) - size, size)
    : Number(octets.readBigInt64BE((at += 8) - 8));
  const bin = (length) => octets.subarray(at, (at += length));
  const array = (length) => Array.from({ length }, value);
  const map = (length) => Object.fromEntries(Array.from({ length }, () => [value(), value()]));
  function value() {
    const tag = uint(1);
    if (tag < 0x80) return tag;
    if (tag < 0x90) return map(tag - 0x80);
    if (tag < 0xa0) return array(tag - 0x90);
    if (tag < 0xc0) return bin(tag - 0xa0).toString();
    if (tag <= 0xc3) return tag === 0xc0 ? null : tag === 0xc3;
    if (tag <= 0xc6) return bin(uint(1 << (tag - 0xc4)));
    if (tag === 0xca) return octets.readFloatBE((at += 4) - 4);
    if (tag === 0xcb) return octets.readDoubleBE((at += 8) - 8);
    if (tag <= 0xcf) return uint(1 << (tag - 0xcc));
    if (tag <= 0xd3) return int(1 << (tag - 0xd0));
    if (tag <= 0xdb) return bin(uint(1 << (tag - 0xd9))).toString();
    if (tag <= 0xdd) return array(uint(2 << (tag - 0xdc)));
    return tag <= 0xdf ? map(uint(2 << (tag - 0xde))) : tag - 0x100;
  }
  return value();
}

// --- the connection: commands out, answers in, as frames ----------------------------------------

const connection = new net.Socket({ fd: 3, readable: true, writable: true });
const waiting = new Map(); // request id -> the promise of its answer
let requests = 0, outbox = [], arrived = Buffer.alloc(0);

export class Failed extends Error { // an error answer
  constructor(code, message, hint) {
    super(hint ? `${message}\n  try: ${hint}` : message);
    this.code = code;
  }
}

export const tell = (op, ...fields) => post([op, null, ...fields]); // no answer wanted
export const ask = (op, ...fields) => new Promise((resolve, reject) => {
  waiting.set(++requests, { resolve, reject });
  post([op, requests, ...fields]);
});
function post(command) { // what one turn of the event loop posts leaves in one frame
  if (outbox.push(command) === 1) setImmediate(flush);
}
function flush() {
  const body = encode(outbox), size = Buffer.alloc(9, 2);
  size.writeBigUInt64BE(BigInt(body.length), 1);
  connection.write(body.length < 256 ? Buffer.of(0, body.length) : size);
  connection.write(body);
  outbox = [];
}
connection.on('data', (octets) => {
  arrived = Buffer.concat([arrived, octets]);
  for (;;) {
    const start = arrived[0] === 2 ? 9 : 2;
    if (arrived.length < start) return;
    const end = start + (start === 9 ? arrived.readUInt32BE(5) : arrived[1]);
    if (arrived.length < end) return;
    for (const [failed, id, value, message, hint] of decode(arrived.subarray(start, end))) {
      const { resolve, reject } = waiting.get(id);
      waiting.delete(id);
      if (failed) reject(new Failed(value, message, hint));
      else resolve(value);
    }
    arrived = arrived.subarray(end);
  }
});
export const finish = () => setImmediate(() => connection.end()); // behind the last frame

// --- what is there at the start: arguments, model, vocabulary -----------------------------------

export const { args, models: [model], limits } = decode(fs.readFileSync(6));

const table = fs.readFileSync(7);
const flags = 12 + 4 * (table.readUInt32LE(8) + 1), texts = flags + table.readUInt32LE(8);
export function octetsOf(tokens) { // their text; a token may end within a character
  return Buffer.concat(tokens.filter((token) => !(table[flags + token] & 1)).map((token) => {
    const [start, end] = [12, 16].map((first) => texts + table.readUInt32LE(first + 4 * token));
    return table.subarray(start, end);
  }));
}
