/**
 * Names of requests and sequences on the page: a letter and a hue for each request, and a number for each of its
 * completions if there are several.
 *
 * Invariant: active requests have different letters.
 */

const HUES = 12; // as many as style.css defines
const LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";

export class Labels {
  #indices = new Map(); // by request id
  #next = 0;

  /** Forget all letters. */
  clear() {
    this.#indices.clear();
    this.#next = 0;
  }

  /** Give the request of a sequence a letter, if it has none. */
  add({ request }) {
    if (this.#indices.has(request)) return;
    const inUse = new Set(this.#indices.values());
    let index = this.#next;
    while (inUse.has(index)) index += 1;
    this.#next = (index + 1) % LETTERS.length;
    this.#indices.set(request, index);
  }

  /** Note that a sequence has finished. Its letter is free once all sequences of its request have finished. */
  finish({ request }, remaining) {
    if (!remaining.some((other) => other.request === request)) this.#indices.delete(request);
  }

  /** "B", or "B2" for one of several completions. */
  of(sequence) {
    const index = completionOf(sequence);
    return this.letter(sequence) + (index === null ? "" : index + 1);
  }

  /** True for a completion that was forked from the first completion of its request. */
  isFork(sequence) {
    return (completionOf(sequence) ?? 0) > 0;
  }

  /** The letter of a sequence's request. */
  letter({ request }) {
    return this.#indices.has(request) ? letters(this.#indices.get(request)) : "?";
  }

  /** 0 .. 11: the hue of a sequence's request. */
  hue({ request }) {
    return (this.#indices.get(request) ?? 0) % HUES;
  }
}

/** The index of a sequence among the completions of its request; null if there is only one. */
export function completionOf({ id, request }) {
  return id === request ? null : Number(id.slice(request.length + 1)); // "request/0", "request/1", ...
}

/** A .. Z, AA .. AZ, BA, ... */
function letters(index) {
  const rest = Math.floor(index / LETTERS.length);
  return (rest ? letters(rest - 1) : "") + LETTERS[index % LETTERS.length];
}
