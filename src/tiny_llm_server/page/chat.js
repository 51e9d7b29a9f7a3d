/** The chat: the conversation, the question, and the answer while it streams. */

import { Markdown } from "./markdown.js";
import { load, save } from "./saved_chat.js";
import { reasonOf } from "./sse.js";

const BLANK = "\u00a0"; // an empty line that keeps its height
const MIN_SECONDS = 0.25; // for a speed measured here: pieces may arrive together
const NEAR = 40; // pixels from the end of the conversation
const HEADINGS = { user: "You", assistant: "Model", refusal: "Not answered" }; // by role

export class Chat {
  #messages = []; // in the format of the API
  #timed = null; // arguments of #show for the last answer
  #running = null; // AbortController of the current answer
  #unsaved = null; // {messages, answer}: the current answer, and the messages up to its question
  #list = document.querySelector("#messages");
  #form = document.querySelector("#chat-form");
  #question = document.querySelector("#question");
  #send = document.querySelector("#send");
  #stop = document.querySelector("#stop-chat");
  #figures = document.querySelector("#chat-figures");
  #hint = this.#list.firstElementChild;

  /** ask: `events`, which asks the user for a key if the server needs one. */
  constructor(ask, known, announcer) {
    this.ask = ask;
    this.known = known;
    this.announcer = announcer;
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
    this.#question.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.#form.requestSubmit();
    });
    this.#stop.addEventListener("click", () => this.stop());
    document.querySelector("#new-chat").addEventListener("click", () => this.#clear());
    addEventListener("pagehide", () => this.#saveUnfinished());
    this.#restore();
  }

  /** Update the speed, because steps have arrived; they may belong to an answer that is already complete. */
  refresh() {
    if (this.#timed) this.#show(...this.#timed);
  }

  /** Cancel the current answer, if there is one. */
  stop() {
    this.#running?.abort();
  }

  #clear() {
    this.stop();
    this.#messages = [];
    this.#unsaved = null;
    save([]);
    this.#list.replaceChildren(this.#hint);
    this.#forgetFigures();
    this.#question.focus();
  }

  /** Show the conversation that this tab had before it was reloaded. */
  #restore() {
    const { messages, question } = load();
    this.#messages = messages;
    this.#question.value ||= question;
    if (messages.length) this.#hint.remove();
    for (const { role, content } of messages) this.#bubble(role).show(content);
    this.#list.scrollTop = this.#list.scrollHeight;
  }

  /** Save as much of a conversation as there is when the page is left during an answer. */
  #saveUnfinished() {
    if (!this.#unsaved) return;
    const { messages, answer } = this.#unsaved;
    if (answer.text) save([...messages, { role: "assistant", content: answer.text }]);
    else save(this.#messages, messages.at(-1).content);
  }

  async #submit() {
    const question = this.#question.value.trim();
    if (!question || this.#running) return;
    const running = new AbortController();
    this.#busy(running);
    this.#question.value = "";
    this.#forgetFigures();
    this.#hint.remove();
    this.#list.querySelector(".refusal")?.remove();
    const asked = this.#bubble("user");
    asked.show(question);
    const bubble = this.#bubble("assistant");
    this.#list.scrollTop = this.#list.scrollHeight;
    const messages = [...this.#messages, { role: "user", content: question }];
    const answer = { text: "", end: null };
    this.#unsaved = { messages, answer };
    try {
      await this.#read(messages, running.signal, bubble, answer);
    } catch (error) {
      answer.end = running.signal.aborted ? "stopped" : failureOf(error, answer.text);
    }
    if (this.#list.contains(bubble.article)) {
      this.#unsaved = null;
      if (answer.text) this.#messages = [...messages, { role: "assistant", content: answer.text }];
      if (answer.text || running.signal.aborted || !answer.end) this.#finish(bubble, answer);
      else this.#returnQuestion(question, asked, bubble, answer.end);
      save(this.#messages, this.#question.value);
    }
    if (this.#running === running) this.#busy(null);
  }

  /** Return a question without an answer to its field, and show the reason. */
  #returnQuestion(question, asked, bubble, why) {
    asked.article.remove();
    bubble.article.remove();
    this.#question.value ||= question;
    const { article } = this.#bubble("refusal");
    this.#finish({ article }, { text: "", end: why });
  }

  async #read(messages, signal, bubble, answer) {
    const body = {
      messages,
      stream: true,
      stream_options: { include_usage: true },
      ...temperature(document.querySelector("#temperature").value),
      max_completion_tokens: Math.max(1, Number(document.querySelector("#max-tokens").value) || 200),
    };
    const times = [performance.now()];
    let reason = null;
    const onAccepted = (id) => this.known.add(id, "chat");
    for await (const { id, choices, usage } of this.ask("v1/chat/completions", { body, signal, onAccepted })) {
      if (usage) this.#show(id, times, usage.completion_tokens);
      for (const { delta, finish_reason: why } of choices) {
        reason = why ?? reason;
        if (!delta.content) continue;
        times.push(performance.now());
        answer.text += delta.content;
        this.known.piece(id, 0, delta.content);
        this.#follow(() => bubble.show(answer.text));
        this.#show(id, times, times.length - 1);
      }
    }
    if (!reason) throw new Error("the answer is incomplete");
    answer.end = reason === "length" ? "stopped at “Max tokens”" : null;
  }

  /** Show the time to first token, measured here, and the speed, on the server's clock if it is known. */
  #show(id, times, tokens) {
    const [asked, first, ...others] = times;
    if (first === undefined) return;
    this.#timed = [id, times, tokens];
    const seconds = ((others.at(-1) ?? first) - first) / 1000;
    const speed = this.known.speed(id) ?? (seconds > MIN_SECONDS ? (tokens - 1) / seconds : null);
    const pace = speed === null ? "" : ` · ${speed.toFixed(0)} tokens/s`;
    const words = tokens === 1 ? "1 token" : `${tokens} tokens`;
    this.#follow(() => {
      this.#figures.textContent = `TTFT ${((first - asked) / 1000).toFixed(2)} s${pace} · ${words}`;
    });
  }

  #forgetFigures() {
    this.#timed = null;
    this.#figures.textContent = BLANK;
  }

  /** Add a message to the conversation; `show` replaces its text, which is Markdown in an answer. */
  #bubble(role) {
    const article = Object.assign(document.createElement("article"), { className: `message ${role}` });
    const head = Object.assign(document.createElement("h3"), { textContent: HEADINGS[role] });
    const body = document.createElement("div");
    article.append(head, body);
    this.#list.append(article);
    if (role !== "assistant") return { article, show: (text) => body.replaceChildren(text) };
    body.className = "markdown";
    const markdown = new Markdown(body);
    return { article, show: (text) => markdown.show(text) };
  }

  /** Make a change that moves the end of the conversation; scroll to the new end if the old end was in view. */
  #follow(change) {
    const { scrollHeight, scrollTop, clientHeight } = this.#list;
    change();
    if (scrollHeight - scrollTop - clientHeight < NEAR) this.#list.scrollTop = this.#list.scrollHeight;
  }

  #finish({ article }, answer) {
    if (answer.end) {
      const end = Object.assign(document.createElement("p"), { className: "end", textContent: answer.end });
      this.#follow(() => article.append(end));
    }
    this.announcer.say(`${answer.text || "No answer"}${answer.end ? `: ${answer.end}` : ""}`);
  }

  #busy(running) {
    this.#running = running;
    const hadFocus = document.activeElement === this.#stop || document.activeElement === this.#send;
    this.#send.hidden = running !== null;
    this.#stop.hidden = running === null;
    if (hadFocus) (running ? this.#stop : this.#question).focus();
  }
}

/** The request's field for the typed temperature; without one, the server uses the model's own value. */
const temperature = (typed) => (typed === "" ? {} : { temperature: Number(typed) });

/** Why an answer is missing or incomplete: the server's error, or a lost connection. */
function failureOf(error, text) {
  const why = reasonOf(error);
  if (error.code === "context_length_exceeded") return `${why}: lower “Max tokens”, or start a new chat`;
  return text ? `incomplete: ${why}` : why;
}
