// text_completion -- goes on from a prompt, with no library: all of it follows from docs/abi.md.
import { StringDecoder } from 'node:string_decoder';
import { args, ask, finish, limits, model, octetsOf, tell } from './abi.mjs';

const SEND = 1, CREATE_QUEUE = 3, ALLOC_KVPAGE = 8, ALLOC_EMB = 13;
const EMBED_TXT = 16, FORWARD = 17, SAMPLE = 19, TOKENIZE = 20;

function quit(code, message) {
  console.error(message);
  process.exit(code);
}
process.on('uncaughtException', (error) => quit(1, `error: ${error.message}`)); // of answers too

const options = { '--prompt': '', '--max-tokens': '64' };
for (let at = 0; at < args.length; at += 2) {
  if (!Object.hasOwn(options, args[at]) || args[at + 1] === undefined)
    quit(2, 'usage: text_completion --prompt TEXT --max-tokens N');
  options[args[at]] = args[at + 1];
}

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
  say(characters.write(octetsOf([token])));
}
say(characters.end());
finish();

