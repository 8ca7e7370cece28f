/** The transcript on the page: lines that can be played, searched, edited and walked with the keyboard. */

import { lineDoubt, percent, wordDoubt } from "./confidence.js";
import { edited } from "./edits.js";
import { shortTime } from "./formats.js";

/** Ranges are painted by the browser where it can; lines that match are marked everywhere. */
const canPaint = "highlights" in CSS;

/** One line: its segment as it is now, as it came, and what shows it. */
class Line {
  constructor(segment) {
    this.original = segment;
    this.segment = segment;
    this.element = element("li", { className: "line" });
    /** Elements of the words, beside `segment.words`. */
    this.words = [];
  }

  get doubt() {
    return this.segment.edited ? { level: 0, reasons: [] } : lineDoubt(this.segment);
  }
}

export class Transcript {
  language = null;
  #list;
  #lines = [];
  #seek;
  #onChange;
  #current = null;
  #markedWord = null;
  #markedLine = null;
  #due = 0;
  #query = null;
  #hits = [];
  #hit = -1;

  /** `onSeek` hears the seconds to play from, `onChange`, a moment later, that lines have come, gone or changed. */
  constructor(list, { onSeek, onChange }) {
    this.#list = list;
    this.#seek = onSeek;
    this.#onChange = onChange;
    list.addEventListener("click", (event) => this.#clicked(event));
    list.addEventListener("keydown", (event) => this.#pressed(event));
    list.addEventListener("focusin", (event) => this.#focused(event));
    list.addEventListener("focusout", ({ target }) => target.matches(".word") && target.removeAttribute("role"));
  }

  get segments() {
    return this.#lines.map((line) => line.segment);
  }

  get levels() {
    return this.#lines.map((line) => line.doubt.level);
  }

  get isEdited() {
    return this.#lines.some((line) => line.segment.edited);
  }

  clear() {
    this.#lines = [];
    this.#current = this.#markedWord = this.#markedLine = null;
    this.#list.replaceChildren();
    this.language = null;
    this.#changed();
  }

  add(segment) {
    const line = new Line(segment);
    this.#lines.push(line);
    this.#show(line);
    this.#list.append(line.element);
    if (this.#lines.length === 1) this.#reach(line);
    this.#changed();
  }

  /** The final segments; lines that were edited meanwhile stay as they were made. */
  settle(segments, language) {
    this.language = language;
    this.#list.lang = language ?? "";
    while (this.#lines.length > segments.length) this.#lines.pop().element.remove();
    segments.forEach((segment, index) => {
      const line = this.#lines[index];
      if (!line) return void this.add(segment);
      if (JSON.stringify(line.original) === JSON.stringify(segment)) return;
      line.original = segment;
      if (line.segment.edited) return;
      line.segment = segment;
      this.#show(line);
    });
    this.#changed();
  }

  // -- playing -------------------------------------------------------------------------------

  /** Mark what is spoken at that second; gives the line's element where it is another one than before. */
  mark(seconds) {
    const line = this.#at(seconds);
    const index = line?.segment.words?.findLastIndex((word) => word.start <= seconds) ?? -1;
    // In the pause behind a word nothing is spoken.
    const word = index >= 0 && seconds < line.segment.words[index].end ? line.words[index] : null;
    this.#markedWord?.classList.remove("current");
    word?.classList.add("current");
    this.#markedWord = word;
    const element = line?.element ?? null;
    if (element === this.#markedLine) return null;
    this.#markedLine?.classList.remove("current");
    this.#markedLine?.removeAttribute("aria-current");
    element?.classList.add("current");
    element?.setAttribute("aria-current", "true");
    return (this.#markedLine = element);
  }

  #at(seconds) {
    let [low, high] = [0, this.#lines.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.#lines[middle].segment.start <= seconds) low = middle + 1;
      else high = middle;
    }
    const line = this.#lines[low - 1];
    return line && seconds < line.segment.end ? line : null;
  }

  #clicked(event) {
    const line = this.#lineOf(event.target);
    if (!line) return;
    if (event.target.closest(".edit")) return this.#edit(line);
    if (event.target.closest(".restore")) return this.#restore(line);
    const index = line.words.indexOf(event.target);
    // Whoever selects text does not want to hear it.
    if (!getSelection().isCollapsed && !event.target.closest("button")) return;
    if (index >= 0) this.#seek(line.segment.words[index].start);
    else if (event.target.closest(".time, .text")) this.#seek(line.segment.start);
  }

  // -- keyboard ------------------------------------------------------------------------------

  #pressed(event) {
    const line = this.#lineOf(event.target);
    if (!line || event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.target.matches("textarea")) return;
    const index = this.#lines.indexOf(line);
    const word = line.words.indexOf(event.target);
    const actions = {
      ArrowDown: () => this.#focusLine(index + 1),
      ArrowUp: () => this.#focusLine(index - 1),
      Home: () => this.#focusLine(0),
      End: () => this.#focusLine(this.#lines.length - 1),
      ArrowRight: () => this.#focusWord(line, word + 1),
      ArrowLeft: () => (word > 0 ? this.#focusWord(line, word - 1) : this.#focusLine(index)),
      e: () => this.#edit(line),
    };
    if (word >= 0) actions.Enter = actions[" "] = () => this.#seek(line.segment.words[word].start);
    const action = actions[event.key];
    if (!action) return;
    event.preventDefault();
    event.stopPropagation();
    action();
  }

  #focusLine(index) {
    this.#lines[index]?.element.querySelector(".time, textarea")?.focus();
  }

  #focusWord(line, index) {
    const word = line.words[index];
    if (!word) return;
    // A button for whoever is on it; to readers of the whole line it is text.
    word.setAttribute("role", "button");
    word.focus();
  }

  #focused(event) {
    const line = this.#lineOf(event.target);
    if (line) this.#reach(line);
  }

  /** Of all lines one is in the tab order, or a long transcript would be a trap. */
  #reach(line) {
    if (this.#current === line) return;
    const before = this.#current;
    this.#current = line;
    for (const one of before ? [before, line] : [line]) this.#setTabStops(one);
  }

  #setTabStops(line) {
    for (const button of line.element.querySelectorAll("button")) button.tabIndex = line === this.#current ? 0 : -1;
  }

  #lineOf(target) {
    const found = target.closest(".line");
    return found && this.#lines.find((line) => line.element === found);
  }

  // -- editing -------------------------------------------------------------------------------

  #edit(line) {
    if (line.element.querySelector("textarea")) return;
    const text = line.segment.text.trim();
    const area = element("textarea", { value: text, rows: Math.ceil(text.length / 60) + 1, dir: "auto" });
    area.setAttribute("aria-label", `Text at ${shortTime(line.segment.start)}`);
    const finish = (keep) => {
      const written = area.value.replace(/\s+/g, " ").trim();
      if (keep && written !== text) line.segment = edited(line.segment, written, this.language);
      this.#show(line);
      line.element.querySelector(".time").focus();
      this.#changed();
    };
    const keep = element("button", { type: "button", textContent: "Keep" });
    const drop = element("button", { type: "button", textContent: "Drop" });
    keep.addEventListener("click", () => finish(true));
    drop.addEventListener("click", () => finish(false));
    area.addEventListener("keydown", (event) => {
      // While a word is composed, Enter chooses among spellings.
      if (event.isComposing || !["Enter", "Escape"].includes(event.key)) return;
      event.preventDefault();
      finish(event.key === "Enter");
    });
    const row = element("div", { className: "row" });
    row.append(keep, drop);
    const box = element("div", { className: "text" });
    box.append(area, row);
    line.words = [];
    line.element.querySelector(".text").replaceWith(box);
    line.element.querySelector(".notes-of-line").remove();
    this.#changed();
    area.focus();
  }

  #restore(line) {
    line.segment = line.original;
    this.#show(line);
    line.element.querySelector(".time").focus();
    this.#changed();
  }

  // -- showing -------------------------------------------------------------------------------

  #show(line) {
    const { segment, doubt } = line;
    const at = shortTime(segment.start);
    line.element.dataset.doubt = doubt.level;
    const time = element("button", { type: "button", className: "time", textContent: at });
    time.setAttribute("aria-label", `Play from ${at}`);
    const text = element("p", { className: "text", dir: "auto" });
    line.words = (segment.words ?? []).map((word) => {
      const span = element("span", { className: "word", tabIndex: -1, textContent: word.word.trim() });
      span.dataset.doubt = wordDoubt(word);
      if (wordDoubt(word)) span.title = `Probability ${percent(word.probability)}`;
      return span;
    });
    // The blank before a word is no part of what is marked.
    if (line.words.length) text.append(...line.words.flatMap((span, index) => [index && blankBefore(segment.words[index]), span]).slice(1));
    else text.textContent = segment.text.trim() || "(empty: left out of downloads)";
    const edit = element("button", { type: "button", className: "edit", textContent: "Edit" });
    edit.setAttribute("aria-label", `Edit the line at ${at}`);
    const notes = element("div", { className: "notes-of-line" });
    notes.append(...this.#notes(line), edit);
    line.element.replaceChildren(time, text, notes);
    this.#setTabStops(line);
  }

  #notes(line) {
    const { segment, doubt } = line;
    if (segment.edited) {
      const restore = element("button", { type: "button", className: "restore", textContent: "Undo" });
      restore.setAttribute("aria-label", `Undo the edit at ${shortTime(segment.start)}`);
      return [element("span", { className: "note", textContent: "Edited" }), restore];
    }
    const said = [];
    if (doubt.level) said.push(`${doubt.level === 2 ? "Doubted" : "Unsure"}: ${doubt.reasons.join(", ")}.`);
    const words = (segment.words ?? []).filter(wordDoubt).map((word) => word.word.trim());
    // What the underlines say, for those who do not see them.
    if (words.length) said.push(`Uncertain words: ${words.join(", ")}.`);
    return said.map((text, index) =>
      element("span", { className: doubt.level && !index ? "note" : "unseen", textContent: text }),
    );
  }

  #changed() {
    // Thousands of lines may come at once: they are counted once.
    this.#due ||= setTimeout(() => {
      this.#due = 0;
      if (this.#query) this.#find();
      this.#onChange();
    }, 50);
  }

  /** Go to the next doubted line, from the first again behind the last; whether there is one. */
  nextDoubt() {
    const from = this.#lines.indexOf(this.#lineOf(document.activeElement) ?? null);
    const order = [...this.#lines.slice(from + 1), ...this.#lines.slice(0, from + 1)];
    const line = order.find((line) => line.doubt.level);
    line?.element.querySelector(".time, textarea").focus();
    return Boolean(line);
  }

  // -- searching -----------------------------------------------------------------------------

  /** Mark all places of a text; gives their number. Upper and lower case are one. */
  search(text) {
    this.#query = text ? new RegExp(text.replace(/[\\^$.*+?()[\]{}|/-]/g, "\\$&").replace(/\s+/g, "\\s+"), "giu") : null;
    this.#find();
    this.#hit = -1;
    return this.#hits.length;
  }

  /** Scroll to another place that was found; gives its number from 1, or 0. */
  step(by) {
    const count = this.#hits.length;
    if (!count) return 0;
    this.#hit = this.#hit < 0 && by < 0 ? count - 1 : (this.#hit + by + count) % count;
    const { line, range } = this.#hits[this.#hit];
    this.#reach(line);
    this.#list.querySelector(".line.found")?.classList.remove("found");
    line.element.classList.add("found");
    line.element.scrollIntoView({ block: "center" });
    if (canPaint) CSS.highlights.set("found", new Highlight(range));
    return this.#hit + 1;
  }

  #find() {
    this.#hits = this.#query ? this.#lines.flatMap((line) => ranges(line, this.#query)) : [];
    for (const line of this.#lines) line.element.classList.remove("hit", "found");
    for (const { line } of this.#hits) line.element.classList.add("hit");
    if (!canPaint) return;
    CSS.highlights.delete("found");
    CSS.highlights.set("search", new Highlight(...this.#hits.map(({ range }) => range)));
  }
}

function ranges(line, query) {
  const text = line.element.querySelector("p.text");
  if (!text) return [];
  const nodes = [];
  const walker = document.createTreeWalker(text, NodeFilter.SHOW_TEXT);
  for (let node, at = 0; (node = walker.nextNode()); at += node.length) nodes.push({ node, at });
  const place = (offset) => {
    const { node, at } = nodes.findLast(({ at }) => at <= offset);
    return [node, offset - at];
  };
  return [...text.textContent.matchAll(query)].map((match) => {
    const range = new Range();
    range.setStart(...place(match.index));
    range.setEnd(...place(match.index + match[0].length));
    return { line, range };
  });
}

function blankBefore({ word }) {
  return word.slice(0, word.length - word.trimStart().length);
}

function element(name, properties) {
  return Object.assign(document.createElement(name), properties);
}
