/** Names and texts of the requests made by this page. `/live` only has numbers, never text. */

import { completionOf } from "./labels.js";

const MAX_REQUESTS = 64; // the newest are remembered

export class Known {
  #requests = new Map(); // request id -> {name, pieces: one list for each completion}
  #times = new Map(); // sequence id -> {first, last}: [t, outputs], on the server's clock

  /** Remember a request of this page. */
  add(request, name) {
    if (this.#requests.has(request)) return;
    this.#requests.set(request, { name, pieces: [] });
    keepNewest(this.#requests);
  }

  /** Add a piece of the text of a completion; a piece is usually a token. */
  piece(request, index, text) {
    const pieces = this.#requests.get(request)?.pieces ?? [];
    (pieces[index] ??= []).push(text);
  }

  /** Note the output counts of steps, whether they have been shown or not. */
  note(steps) {
    for (const { t, sequences } of steps) {
      for (const { id, outputs } of sequences.filter((sequence) => sequence.outputs)) {
        if (!this.#times.has(id)) keepNewest(this.#times.set(id, { first: [t, outputs] }));
        this.#times.get(id).last = [t, outputs];
      }
    }
  }

  /** Tokens per second of a request's first completion, from the steps received so far; null if unknown. */
  speed(request) {
    const { first, last } = this.#times.get(request) ?? this.#times.get(`${request}/0`) ?? {};
    return first && last[0] > first[0] ? (last[1] - first[1]) / (last[0] - first[0]) : null;
  }

  /** A sequence's name, and its text up to its number of outputs: the text may be ahead of the step that is shown. */
  of(sequence) {
    const request = this.#requests.get(sequence.request);
    if (!request) return { name: "another client", text: "" };
    const pieces = request.pieces[completionOf(sequence) ?? 0] ?? [];
    return { name: request.name, text: pieces.slice(0, sequence.outputs).join("") };
  }
}

function keepNewest(map) {
  if (map.size > MAX_REQUESTS) map.delete(map.keys().next().value);
}
