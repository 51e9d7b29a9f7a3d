/** What this page knows of requests that it made itself: `/live` has numbers alone, and no text of anybody. */

import { completionOf } from "./labels.js";

const MOST_REQUESTS = 64; // that are remembered, the newest

export class Known {
  #requests = new Map(); // request id -> {name, pieces: one list for each completion}
  #times = new Map(); // sequence id -> {first, last}: [t, outputs], by the server's clock

  /** This page has made a request. */
  add(request, name) {
    if (this.#requests.has(request)) return;
    this.#requests.set(request, { name, pieces: [] });
    keepNewest(this.#requests);
  }

  /** A piece of one of its answers has come, which is usually a token. */
  piece(request, index, text) {
    const pieces = this.#requests.get(request)?.pieces ?? [];
    (pieces[index] ??= []).push(text);
  }

  /** Steps have come, and may not have been shown. */
  note(steps) {
    for (const { t, sequences } of steps) {
      for (const { id, outputs } of sequences.filter((sequence) => sequence.outputs)) {
        if (!this.#times.has(id)) keepNewest(this.#times.set(id, { first: [t, outputs] }));
        this.#times.get(id).last = [t, outputs];
      }
    }
  }

  /** Tokens a second of a request's first completion, as far as its steps have come; null where that is unknown. */
  speed(request) {
    const { first, last } = this.#times.get(request) ?? this.#times.get(`${request}/0`) ?? {};
    return first && last[0] > first[0] ? (last[1] - first[1]) / (last[0] - first[0]) : null;
  }

  /** A sequence's name, and its text as far as its outputs go: the text may be ahead of what is shown. */
  of(sequence) {
    const request = this.#requests.get(sequence.request);
    if (!request) return { name: "another client", text: "" };
    const pieces = request.pieces[completionOf(sequence) ?? 0] ?? [];
    return { name: request.name, text: pieces.slice(0, sequence.outputs).join("") };
  }
}

function keepNewest(map) {
  if (map.size > MOST_REQUESTS) map.delete(map.keys().next().value);
}
