/** The figures above the pool, from the engine's statistics and the times of its steps. */

const WINDOW = 2; // seconds on the server's clock over which tokens are counted

const NAMES = {
  speed: ["Tokens/s", "Output tokens of all requests per second, over the last two seconds of steps"],
  running: ["Running", "Sequences in the batch; each of a request's n completions is one"],
  waiting: ["Waiting", "Sequences that have not started or were preempted"],
  usage: ["Pool in use", "Blocks in block tables; cached blocks that are not in use can be evicted at any time"],
  hits: ["Prefix hit rate", "Share of prompt tokens found in the prefix cache, since the server started"],
  guesses: ["Guesses", "Tokens guessed by speculative decoding: accepted, and rejected, since the server started"],
  preemptions: ["Preemptions", "Times a running sequence lost its blocks to others, since the server started"],
};

export class Figures {
  #values = {};
  #bar;
  #steps = []; // [t, tokens]

  constructor(pool) {
    this.pool = pool;
    const list = document.querySelector("#figures");
    for (const [name, [title, meaning]] of Object.entries(NAMES)) {
      const box = Object.assign(document.createElement("div"), { title: meaning });
      const [head, value] = [document.createElement("dt"), document.createElement("dd")];
      head.textContent = title;
      value.id = `figure-${name}`;
      value.textContent = "–";
      box.append(head, value);
      list.append(box);
      this.#values[name] = value;
    }
    this.#bar = Object.assign(document.createElement("span"), { className: "bar" });
    this.#bar.setAttribute("aria-hidden", "true");
    this.#values.usage.after(this.#bar);
    this.#values.swapped = Object.assign(document.createElement("dd"), { className: "second" });
    this.#values.waiting.after(this.#values.swapped);
    this.#values.wrong = Object.assign(document.createElement("dd"), { className: "second" });
    this.#values.guesses.after(this.#values.wrong);
  }

  /** Start again, because the pool's state has been replaced. */
  reset() {
    this.#steps = [];
    this.update();
  }

  /** Count the tokens of a step that has been shown. */
  note(change) {
    this.#steps.push([change.t, change.tokens]);
    while (this.#steps[0][0] < change.t - WINDOW) this.#steps.shift();
  }

  /** Show the current figures. */
  update() {
    const { stats, numBlocks } = this.pool;
    if (!stats) return;
    const held = numBlocks - stats.free - stats.cached;
    this.#set("speed", stats.running ? this.#speed() : "–");
    this.#set("running", `${stats.running}`);
    this.#set("waiting", `${stats.waiting}`);
    this.#set("swapped", stats.swapped ? `${stats.swapped} swapped` : "");
    this.#set("usage", `${held} of ${numBlocks}`);
    this.#set("hits", stats.prefix_queries ? percent(stats.prefix_hits / stats.prefix_queries) : "–");
    const [right, wrong] = [stats.guesses_right ?? 0, stats.guesses_wrong ?? 0];
    this.#values.guesses.parentElement.hidden = right + wrong === 0; // without speculation there are none
    this.#set("guesses", `${right} accepted`);
    this.#set("wrong", `${wrong} rejected`);
    this.#set("preemptions", `${stats.preemptions}`);
    this.#bar.style.setProperty("--held", percent(held / numBlocks));
    this.#bar.style.setProperty("--cached", percent((held + stats.cached) / numBlocks));
  }

  #speed() {
    const [first] = this.#steps[0] ?? [0];
    const [last] = this.#steps.at(-1) ?? [0];
    if (last - first < 0.2) return "–";
    const tokens = this.#steps.slice(1).reduce((sum, [, count]) => sum + count, 0);
    return (tokens / (last - first)).toFixed(0);
  }

  #set(name, text) {
    if (this.#values[name].textContent !== text) this.#values[name].textContent = text;
  }
}

const percent = (share) => `${Math.round(100 * share)}%`;
