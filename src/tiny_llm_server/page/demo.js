/**
 * "Load it": requests that need more blocks than a small pool has, so that they share, fork, and give way.
 *
 * All sizes are shares of the pool in tokens, capped so that a large pool is not kept busy for minutes.
 */

import { reasonOf } from "./sse.js";

const MOST_TOKENS = 2048; // of a pool that the demo can fill
const CHARACTERS = 4.6; // of a token of English text, about

const SENTENCES = [
  "You are a patient teacher who explains how language models are served.",
  "Answer in plain English, in full sentences, and give one example for each idea.",
  "A model writes one token at a time, and each token attends to all tokens before it.",
  "Their keys and values are kept, so that nothing is computed twice: this is the cache.",
  "The cache is cut into blocks of a few tokens, and any free block will do for the next one.",
  "A block table says which block of the pool holds which part of a sequence.",
  "Sequences that begin alike can hold the same blocks, and each holder is counted.",
  "Who writes to a block that others hold writes to a copy of it instead.",
  "When blocks run out, the newest sequence gives its blocks up and waits for its turn.",
  "Its blocks may wait on the host, or be computed again when there is room.",
  "A block that nobody holds may be kept for a while, because the same prompt may come again.",
  "The least recently used blocks are given up first.",
];

const TASK = "Tell it as a long story:";

/** A text of about so many tokens, which is the same each time. */
export function textOf(tokens) {
  const parts = [];
  let length = 0;
  for (let i = 0; length < tokens * CHARACTERS; i += 1) {
    const sentence = SENTENCES[i % SENTENCES.length];
    parts.push(i < SENTENCES.length ? sentence : `Rule ${i + 1}: ${sentence}`);
    length += parts.at(-1).length + 1;
  }
  return parts.join(" ").slice(0, Math.max(1, Math.round(tokens * CHARACTERS)));
}

/**
 * The requests for a pool, in the order in which they are sent: together about 1.3 times as many blocks as it has.
 *
 * No more than four: a browser has six connections to a server, one is `/live`'s and one the chat's.
 * @param {{numBlocks: number, blockSize: number, numTables: number}} pool
 * @returns {{isLarge: boolean, requests: {name: string, body: object}[]}}
 */
export function plan({ numBlocks, blockSize, numTables }) {
  const tokens = (numBlocks * blockSize) / numTables;
  const most = Math.min(tokens, MOST_TOKENS);
  const share = (part) => Math.max(4, Math.round(part * most));
  const system = { role: "system", content: textOf(share(0.2)) };
  const requests = [
    request("long prompt", [user(`Go on: ${textOf(share(0.25))}`)], share(0.1), 1),
    request("shared 1", [system, user(`${TASK} why are there blocks?`)], share(0.13), 2),
    request("shared 2", [system, user(`${TASK} what is in a block table?`)], share(0.13), 3),
    request("n = 3", [system, user(`${TASK} who may share a block?`)], share(0.13), 4, 3),
  ];
  return { isLarge: tokens > 1.5 * MOST_TOKENS, requests };
}

const user = (content) => ({ role: "user", content });

function request(name, messages, length, seed, n = 1) {
  const sampling = { temperature: 0.8, seed, n, min_tokens: length, max_completion_tokens: length };
  return { name, body: { messages, stream: true, ...sampling } };
}

export class Demo {
  #running = null;
  #note = document.querySelector("#demo-note");
  #load = document.querySelector("#load");

  /** ask: `events`, with a key where one is needed. */
  constructor(pool, ask, known) {
    this.pool = pool;
    this.ask = ask;
    this.known = known;
    this.#load.addEventListener("click", () => this.start());
  }

  /** Without a pool there is nothing to load; what was said of a server that was gone is over once it is back. */
  enable(hasPool, isLive) {
    this.#load.disabled = !hasPool;
    if (isLive && !this.#running) this.#say("");
  }

  /** Cancel its requests. */
  stop() {
    this.#running?.abort();
  }

  /** Send its requests, if they are not under way; returns when all have ended. */
  async start() {
    if (this.#running) return;
    const running = (this.#running = new AbortController());
    const { isLarge, requests } = plan(this.pool);
    this.#load.setAttribute("aria-disabled", "true");
    this.#say(isLarge ? "Preemption needs a smaller pool: tiny-llm serve --demo" : "");
    const failure = await this.#send(requests, running.signal);
    if (running.signal.aborted || !failure) this.#say("");
    else this.#say(`Not all could run: ${reasonOf(failure)}`);
    this.#load.removeAttribute("aria-disabled");
    this.#running = null;
  }

  /**
   * One after the other has been accepted, so that the newest is the same each time.
   * Returns when all have ended: what the first one failed with, after which no more are sent, or undefined.
   */
  async #send(requests, signal) {
    const failures = [];
    const answers = [];
    for (const one of requests) {
      await new Promise((accepted) => {
        const answer = this.#read(one, signal, accepted);
        answers.push(answer.catch((error) => failures.push(error)).finally(accepted));
      });
      if (failures.length) break;
    }
    await Promise.all(answers);
    return failures[0];
  }

  async #read({ name, body }, signal, accepted) {
    const onAccepted = (id) => {
      this.known.add(id, name);
      accepted();
    };
    for await (const { id, choices } of this.ask("v1/chat/completions", { body, signal, onAccepted })) {
      for (const { index, delta } of choices) if (delta.content) this.known.piece(id, index, delta.content);
    }
  }

  #say(text) {
    this.#note.textContent = text;
  }
}
