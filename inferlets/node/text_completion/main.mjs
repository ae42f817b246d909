// text_completion -- goes on from a prompt, with no library: all of it follows from docs/abi.md.
import fs from 'node:fs';
import net from 'node:net';
import { StringDecoder } from 'node:string_decoder';

const SEND = 1, CREATE_QUEUE = 3, ALLOC_KVPAGE = 8, ALLOC_EMB = 13;
const EMBED_TXT = 16, FORWARD = 17, SAMPLE = 19, TOKENIZE = 20;

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
const waiting = new Map(); // request id -> what takes its answer
let requests = 0, outbox = [], arrived = Buffer.alloc(0);

const tell = (op, ...fields) => post([op, null, ...fields]); // no answer wanted
const ask = (op, ...fields) => new Promise((resolve) => {
  waiting.set(++requests, resolve);
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
function quit(code, message) {
  console.error(message);
  process.exit(code);
}
connection.on('data', (octets) => {
  arrived = Buffer.concat([arrived, octets]);
  for (;;) {
    const start = arrived[0] === 2 ? 9 : 2;
    if (arrived.length < start) return;
    const end = start + (start === 9 ? arrived.readUInt32BE(5) : arrived[1]);
    if (arrived.length < end) return;
    for (const [failed, id, value, message, hint] of decode(arrived.subarray(start, end)))
      if (failed) quit(1, `error: ${message}\n  try: ${hint}`);
      else waiting.get(id)(value);
    arrived = arrived.subarray(end);
  }
});

// --- what is there at the start: arguments, model, vocabulary -----------------------------------

const { args, models: [model], limits } = decode(fs.readFileSync(6));
const options = { '--prompt': '', '--max-tokens': '64' };
for (let at = 0; at < args.length; at += 2) {
  if (!Object.hasOwn(options, args[at]) || args[at + 1] === undefined)
    quit(2, 'usage: text_completion --prompt TEXT --max-tokens N');
  options[args[at]] = args[at + 1];
}

const table = fs.readFileSync(7);
const flags = 12 + 4 * (table.readUInt32LE(8) + 1), texts = flags + table.readUInt32LE(8);
function textOf(token) {
  const [start, end] = [12, 16].map((first) => texts + table.readUInt32LE(first + 4 * token));
  return table[flags + token] & 1 ? Buffer.alloc(0) : table.subarray(start, end);
}

// --- the program --------------------------------------------------------------------------------

const QUEUE = 1, KV = 1, EMB = 1, TOKEN = 1; // handles are ours to choose
const AHEAD = 32; // steps queued before their tokens are known

const prompt = await ask(TOKENIZE, 0, options['--prompt']);
const most = Math.min(Number(options['--max-tokens']), model.max_context - prompt.length);
if (!prompt.length || !(most >= 1))
  quit(2, 'the prompt is empty or too long, or --max-tokens is no number from 1');
const chunk = Math.min(limits.embeds, 512);
tell(CREATE_QUEUE, QUEUE);
tell(ALLOC_KVPAGE, QUEUE, KV, Math.ceil((prompt.length + most) / model.page_size));
tell(ALLOC_EMB, QUEUE, EMB, chunk);

let length = 0, sampled = 0; // tokens that are in the cache, or will be; steps that are queued
function forward(tokens) { // late-bound ones are negative
  const count = tokens.length, last = [EMB, count - 1, 1]; // its hidden state takes its place
  tell(EMBED_TXT, QUEUE, [EMB, 0], tokens, length);
  tell(FORWARD, QUEUE, [EMB, 0, count], length ? [[KV, 0, length]] : [], [KV, length, count], last);
  length += count;
}
function sample(index) { // greedy; the first and the last answer come at once
  const lazy = ++sampled > 1 && sampled < most;
  return ask(SAMPLE, QUEUE, [EMB, index], TOKEN, 0, 0, 1, 0, null, model.eos_tokens, lazy);
}

for (let at = 0; at < prompt.length; at += chunk) forward(prompt.slice(at, at + chunk));
const steps = [sample((prompt.length - 1) % chunk)];
const characters = new StringDecoder('utf8'); // a token may end within one
const say = (text) => text && tell(SEND, Buffer.from(text));
while (steps.length) {
  if (steps.length <= AHEAD / 2)
    while (steps.length < AHEAD && sampled < most) {
      forward([-1 - TOKEN]);
      steps.push(sample(0));
    }
  const token = await steps.shift(); // null behind a token that stopped the chain
  if (token === null || model.eos_tokens.includes(token)) break;
  say(characters.write(textOf(token)));
}
say(characters.end());
setImmediate(() => connection.end()); // behind the last frame
