// member -- the member of three_languages that is written in JavaScript, with no library.
//
// main.py starts it with: its language, the group's name, its part of the text, and how many tokens
// to go on for. It does what the other two do: saves its part, says so, and goes on from each.
// An inferlet reads only its own folder, so make puts this file beside a copy of abi.mjs in build/.
import { args, ask, Failed, finish, limits, model, octetsOf, tell } from './abi.mjs';

const SEND = 1, RECEIVE = 2, CREATE_QUEUE = 3, DESTROY_QUEUE = 4, ALLOC_KVPAGE = 8;
const COPY_KVPAGE = 11, ALLOC_EMB = 13, EMBED_TXT = 16, FORWARD = 17, SAMPLE = 19, TOKENIZE = 20;
const BROADCAST = 22, SUBSCRIBE = 23, NEXT_MESSAGE = 25, EXPORT_KVPAGE = 42, IMPORT_KVPAGE = 44;
const CLOSED = 14; // the error: the other side will send no more

const QUEUE = 1, EMB = 1, TOKEN = 1, OWN = 1, SHARED = 2, SUBSCRIPTION = 1; // ours to choose
const EMBEDS = Math.min(limits.embeds, 512);
const STEPS = 32; // queued before their tokens are known

const [language, group, part, maxTokens] = args;

// --- contexts: tokens, and their keys and values in pages ----------------------------------------

const pagesOf = (slots) => Math.ceil(slots / model.page_size);

// The meta of a saved context: "PIEC", version 1, parts, tokens, tokens written, three octets each.
function pack(tokens) {
  const meta = Buffer.alloc(17 + 3 * tokens.length);
  meta.write('PIEC\x01');
  [1, tokens.length, tokens.length].forEach((n, i) => meta.writeUInt32LE(n, 5 + 4 * i));
  tokens.forEach((token, i) => meta.writeUIntLE(token, 17 + 3 * i, 3));
  return meta;
}

function unpack(meta) {
  if (meta.subarray(0, 5).toString() !== 'PIEC\x01' || meta.readUInt32LE(5) !== 1)
    throw new Failed(0, 'this is no saved context, or one in several parts', 'save a shorter one');
  const length = meta.readUInt32LE(9), written = meta.readUInt32LE(13);
  return [Array.from({ length }, (_, i) => meta.readUIntLE(17 + 3 * i, 3)), written];
}

// Runs the model on `tokens` (late-bound ones are negative) at `position` and on. Slots before
// `shared` are in pages of others, which are only read; those behind are our own. Gives the embed
// that gets the last one's hidden state.
function forward(tokens, position, shared = 0) {
  let last;
  for (let at = 0; at < tokens.length; at += EMBEDS) {
    const count = Math.min(tokens.length - at, EMBEDS), first = position + at;
    const reads = [[SHARED, 0, shared], [OWN, 0, first - shared]].filter((span) => span[2]);
    last = [EMB, count - 1];
    tell(EMBED_TXT, QUEUE, [EMB, 0], tokens.slice(at, at + count), first);
    tell(FORWARD, QUEUE, [EMB, 0, count], reads, [OWN, first - shared, count], [...last, 1]);
  }
  return last;
}

async function save() {
  const tokens = await ask(TOKENIZE, 0, part);
  const pages = pagesOf(tokens.length);
  tell(CREATE_QUEUE, QUEUE);
  tell(ALLOC_EMB, QUEUE, EMB, EMBEDS);
  tell(ALLOC_KVPAGE, QUEUE, OWN, pages);
  forward(tokens, 0);
  await ask(EXPORT_KVPAGE, QUEUE, `${group}/${language}`, [[OWN, 0, pages]], pack(tokens));
  tell(DESTROY_QUEUE, QUEUE); // the export holds the pages
}

// Goes on from the pages that `whose` has saved, which are not computed again.
async function goOn(whose, sender) {
  tell(CREATE_QUEUE, QUEUE);
  const [pages, meta] = await ask(IMPORT_KVPAGE, QUEUE, SHARED, `${group}/${whose}`);
  const [tokens, written] = unpack(meta);
  const length = tokens.length, most = Math.min(Number(maxTokens), model.max_context - length);
  const from = Math.min(written, length - 1); // the last one runs again: it tells what comes next
  const shared = from - (from % model.page_size); // nobody may write into a shared page,
  tell(ALLOC_EMB, QUEUE, EMB, EMBEDS);
  tell(ALLOC_KVPAGE, QUEUE, OWN, pagesOf(length + most - shared));
  if (from > shared) // so the last one, which is not full, is copied
    tell(COPY_KVPAGE, QUEUE, [SHARED, shared, from - shared], [OWN, 0, from - shared]);

  const text = [];
  let last = forward(tokens.slice(from), from, shared);
  for (let stopped = false; text.length < most && !stopped;) {
    const steps = [];
    for (let at = text.length; at < Math.min(most, text.length + STEPS); at++) {
      if (at) last = forward([-1 - TOKEN], length + at - 1, shared);
      steps.push(ask(SAMPLE, QUEUE, last, TOKEN, 0, 0, 1, 0, null, model.eos_tokens));
    }
    for (const token of await Promise.all(steps)) { // null behind one that stopped the chain
      stopped ||= token === null || model.eos_tokens.includes(token);
      if (!stopped) text.push(token);
    }
  }
  tell(DESTROY_QUEUE, QUEUE);
  const report = `${whose} ${sender} ${length} ${pages} ${octetsOf(text)}`;
  tell(SEND, Buffer.from(report));
}

// --- the program ---------------------------------------------------------------------------------

// The next broadcast in the group: "start LANGUAGE ..." by main.py, or "saved LANGUAGE".
async function hear() {
  const [data, sender] = await ask(NEXT_MESSAGE, SUBSCRIPTION);
  return [data.toString().split(' ').slice(1), sender];
}

try {
  await ask(SUBSCRIBE, SUBSCRIPTION, group, true);
  tell(SEND, Buffer.from('ready'));
  const [members] = await hear();
  await save();
  tell(BROADCAST, group, Buffer.from(`saved ${language}`), true);
  for (const _ of members) { // its own pages are one of them
    const [[whose], sender] = await hear();
    await goOn(whose, sender);
  }
  // The others may not have what they need yet: main.py says when all do, by closing.
  await ask(RECEIVE).catch((error) => { if (error.code !== CLOSED) throw error; });
  finish();
} catch (error) {
  console.error(`the member in JavaScript: error: ${error.message}`);
  process.exit(1);
}
