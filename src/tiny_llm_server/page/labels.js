/**
 * What requests and sequences are called on the page: a letter and a hue for each request, and a number for each
 * of several completions.
 *
 * Invariant: requests that have not ended have different letters.
 */

const HUES = 12; // as many as style.css has
const LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";

export class Labels {
  #requests = new Map(); // id -> {index, sequences, isNumbered}
  #inUse = new Set();
  #next = 0;

  /** Forget all names. */
  clear() {
    this.#requests.clear();
    this.#inUse.clear();
    this.#next = 0;
  }

  /** Give names to a sequence and its request, if they have none. */
  add(sequence) {
    const request = this.#requests.get(sequence.request) ?? this.#newRequest(sequence.request);
    if (!request.sequences.includes(sequence.id)) request.sequences.push(sequence.id);
    request.isNumbered ||= sequence.forks > 0 || request.sequences.length > 1;
  }

  /** A sequence has ended: once all of its request have, their letter may be used again. */
  end(sequence, remaining) {
    const request = this.#requests.get(sequence.request);
    if (!request || remaining.some((other) => other.request === sequence.request)) return;
    this.#inUse.delete(request.index);
    this.#requests.delete(sequence.request);
  }

  /** "B", or "B2" for one of several completions. */
  of(sequence) {
    const request = this.#requests.get(sequence.request);
    if (!request) return "?";
    const number = request.isNumbered ? request.sequences.indexOf(sequence.id) + 1 : "";
    return letters(request.index) + number;
  }

  /** True for a completion that was forked from its request's first one. */
  isFork(sequence) {
    return (this.#requests.get(sequence.request)?.sequences.indexOf(sequence.id) ?? 0) > 0;
  }

  /** The letter of a sequence's request. */
  letter(sequence) {
    const request = this.#requests.get(sequence.request);
    return request ? letters(request.index) : "?";
  }

  /** 0 .. 11: the hue of a sequence's request. */
  hue(sequence) {
    return (this.#requests.get(sequence.request)?.index ?? 0) % HUES;
  }

  #newRequest(id) {
    let index = this.#next;
    while (this.#inUse.has(index)) index += 1;
    this.#next = (index + 1) % LETTERS.length;
    this.#inUse.add(index);
    const request = { index, sequences: [], isNumbered: false };
    this.#requests.set(id, request);
    return request;
  }
}

/** A .. Z, AA .. AZ, BA, ... */
function letters(index) {
  const rest = Math.floor(index / LETTERS.length);
  return (rest ? letters(rest - 1) : "") + LETTERS[index % LETTERS.length];
}
