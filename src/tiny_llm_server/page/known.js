/** What this page knows of requests that it made itself: `/live` has numbers alone, and no text of anybody. */

export class Known {
  #requests = new Map(); // request id -> {name, pieces: one list for each completion}

  /** This page has made a request. */
  add(request, name) {
    if (!this.#requests.has(request)) this.#requests.set(request, { name, pieces: [] });
  }

  /** A piece of one of its answers has come, which is usually a token. */
  piece(request, index, text) {
    const { pieces } = this.#requests.get(request);
    (pieces[index] ??= []).push(text);
  }

  /** Forget a request, some time after its end. */
  forget(request) {
    this.#requests.delete(request);
  }

  /** A sequence's name, and its text as far as its outputs go: the text may be ahead of what is shown. */
  of(sequence) {
    const request = this.#requests.get(sequence.request);
    if (!request) return { name: "another client", text: "" };
    const index = Number(/\/(\d+)$/.exec(sequence.id)?.[1] ?? 0);
    return { name: request.name, text: (request.pieces[index] ?? []).slice(0, sequence.outputs).join("") };
  }
}
