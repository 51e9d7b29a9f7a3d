/**
 * "Load it": requests that need more blocks than a small pool has, which shows sharing, forks and preemption.
 *
 * All lengths are fractions of the pool's size in tokens, capped so that a round in a large pool is not too long.
 */

import { reasonOf } from "./sse.js";

const MAX_TOKENS = 2048; // of a pool that the demo fills
const CHARACTERS = 4.6; // per token of English text, roughly
const PAUSE = 500; // ms between two rounds
const SMALLER_POOL = "Preemption needs a smaller pool: ";
const REPEATS = "Repeats until you stop it.";

const SENTENCES = [
  "You are a patient teacher who explains how language models are served.",
  "Answer in plain English, in full sentences, and give one example for each idea.",
  "A model writes one token at a time, and each token attends to all tokens before it.",
  "Their keys and values are stored, so that nothing is computed twice: this is the KV cache.",
  "The cache is divided into blocks of a few tokens, and a sequence can use any free block next.",
  "A block table maps each part of a sequence to a block of the pool.",
  "Sequences with the same prefix can share blocks, and each block counts its references.",
  "A sequence that writes to a shared block writes to a copy of it instead.",
  "When blocks run out, the newest sequence is preempted and waits until blocks are free.",
  "Its blocks are swapped to host memory, or computed again when it resumes.",
  "A block that is no longer in use stays cached, because the same prompt may come again.",
  "The least recently used blocks are evicted first.",
];

const TASK = "Tell it as a long story:";

/** A text of about this many tokens, always the same. */
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
 * The requests for a pool, in the order of sending. Together they need about 1.3 times the blocks of the pool.
 *
 * There are four: a browser opens six connections to a server, of which `/live` takes one and the chat one.
 * @param {{numBlocks: number, blockSize: number, numTables: number}} pool
 * @returns {{isLarge: boolean, requests: {name: string, body: object}[]}}
 */
export function plan({ numBlocks, blockSize, numTables }) {
  const tokens = (numBlocks * blockSize) / numTables;
  const capped = Math.min(tokens, MAX_TOKENS);
  const share = (part) => Math.max(4, Math.round(part * capped));
  const system = { role: "system", content: textOf(share(0.26)) };
  const requests = [
    request("long prompt", [user(`Go on: ${textOf(share(0.29))}`)], share(0.09), 1),
    request("shared 1", [system, user(`${TASK} why are there blocks?`)], share(0.11), 2),
    request("shared 2", [system, user(`${TASK} what is in a block table?`)], share(0.11), 3),
    request("n = 3", [system, user(`${TASK} which sequences share a block?`)], share(0.11), 4, 3),
  ];
  return { isLarge: tokens > 1.5 * MAX_TOKENS, requests };
}

const user = (content) => ({ role: "user", content });

function request(name, messages, length, seed, n = 1) {
  const sampling = { temperature: 0.8, seed, n, min_tokens: length, max_completion_tokens: length };
  return { name, body: { messages, stream: true, ...sampling } };
}

export class Demo {
  #running = null;
  #note = document.querySelector("#demo-note");
  #button = document.querySelector("#load");

  /**
   * ask: `events`, which asks the user for a key if the server needs one. onStart, onStop: called when the load starts
   * and after it has stopped. hasShown: returns whether all steps received so far have been shown.
   */
  constructor(pool, ask, known, { onStart, onStop, hasShown }) {
    this.pool = pool;
    this.ask = ask;
    this.known = known;
    this.onStart = onStart;
    this.onStop = onStop;
    this.hasShown = hasShown;
    this.#button.addEventListener("click", () => (this.#running ? this.stop() : this.start()));
    addEventListener("pagehide", () => this.stop());
  }

  /** Enable the button if there is a pool to load. A connection that is restored clears the last failure. */
  enable(hasPool, isLive) {
    this.#button.disabled = !hasPool;
    if (isLive && !this.#running) this.#say("");
  }

  /** Cancel the requests. */
  stop() {
    this.#running?.abort();
  }

  /**
   * Send the requests, round by round, until `stop` is called or a request fails. A round only starts when the page has
   * shown the last one and is visible. The server is therefore idle most of the time if the replay is slow.
   */
  async start() {
    if (this.#running) return;
    const running = (this.#running = new AbortController());
    const { isLarge, requests } = plan(this.pool);
    this.#button.textContent = "Stop";
    this.#say(...(isLarge ? [SMALLER_POOL, command("tiny-llm serve --demo")] : [REPEATS]));
    this.onStart();
    let failure;
    const { signal } = running;
    while (!failure && !signal.aborted) {
      failure = await this.#round(requests, signal);
      if (!failure) do await pause(PAUSE, signal); while (!signal.aborted && !this.#mayGoOn());
    }
    this.#say(signal.aborted ? "" : `The load has stopped: ${reasonOf(failure)}`);
    this.#button.textContent = "Load it";
    this.#running = null;
    this.onStop();
  }

  #mayGoOn() {
    return this.hasShown() && !document.hidden;
  }

  /**
   * Send each request when the one before has been accepted, so that the newest is the same in each round.
   * After a failure, no more are sent. Returns the first failure, or undefined, when all sent requests have finished.
   */
  async #round(requests, signal) {
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

  #say(...content) {
    this.#note.replaceChildren(...content);
  }
}

/** A command that stays on one line. */
const command = (text) => Object.assign(document.createElement("code"), { textContent: text });

/** Returns after `ms`, or as soon as the signal is aborted. */
function pause(ms, signal) {
  return new Promise((resolve) => {
    const end = () => {
      clearTimeout(timer);
      signal.removeEventListener("abort", end);
      resolve();
    };
    const timer = setTimeout(end, ms);
    signal.addEventListener("abort", end);
  });
}
