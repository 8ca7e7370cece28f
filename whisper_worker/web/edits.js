/** What an edit does to a line: its text is the person's, its times are still the recording's. */

import { UNSPACED } from "./languages.js";

/**
 * The segment with another text. Words that stay keep their times; new ones share the time of those
 * they replace, or of the gap that they fill, by their lengths. `edited` marks it, and the tokens,
 * which were those of the old text, go.
 */
export function edited(segment, text, language) {
  const blank = segment.text.match(/^\s*/)[0];
  const changed = { ...segment, text: blank + text.trim(), tokens: [], edited: true };
  if (segment.words) changed.words = retimed(segment, pieces(text, language));
  return changed;
}

function pieces(text, language) {
  // Trailing punctuation belongs to its character, as it does in the service's words.
  if (UNSPACED.has(language)) return text.trim().match(/[^\p{P}\s]?[\p{P}\s]*/gu).filter((piece) => piece.trim());
  return text.trim().split(/\s+/).filter(Boolean).map((word) => ` ${word}`);
}

function retimed(segment, texts) {
  const old = segment.words;
  const kept = matches(old.map((word) => core(word.word)), texts.map(core));
  const words = [];
  let from = 0;
  for (let to = 0; to <= texts.length; to++) {
    if (to < texts.length && kept[to] < 0) continue;
    const before = from ? kept[from - 1] : -1;
    const after = to < texts.length ? kept[to] : old.length;
    // Of the words between two that stay, those that were there tell when the new ones are spoken.
    const replaced = old.slice(before + 1, after);
    const start = replaced[0]?.start ?? old[before]?.end ?? segment.start;
    const end = replaced.at(-1)?.end ?? old[after]?.start ?? segment.end;
    words.push(...shared(texts.slice(from, to), start, end));
    if (to < texts.length) words.push({ ...old[after], word: texts[to] });
    from = to + 1;
  }
  return words;
}

function shared(texts, start, end) {
  const total = texts.reduce((sum, text) => sum + text.length, 0);
  let done = 0;
  return texts.map((text) => {
    const from = start + ((end - start) * done) / total;
    done += text.length;
    // A person wrote it: that is as sure as a word gets.
    return { word: text, start: rounded(from), end: rounded(start + ((end - start) * done) / total), probability: 1 };
  });
}

/** For each of `b` the index in `a` of what it was, -1 where it is new: a longest common subsequence. */
function matches(a, b) {
  const lengths = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      lengths[i][j] = a[i] === b[j] ? lengths[i + 1][j + 1] + 1 : Math.max(lengths[i + 1][j], lengths[i][j + 1]);
    }
  }
  const found = new Array(b.length).fill(-1);
  for (let i = 0, j = 0; i < a.length && j < b.length; ) {
    if (a[i] === b[j]) found[j++] = i++;
    else if (lengths[i + 1][j] >= lengths[i][j + 1]) i++;
    else j++;
  }
  return found;
}

/** A word without case and punctuation: "Stew," is still "stew". */
function core(word) {
  return word.toLowerCase().replace(/[^\p{L}\p{N}\p{M}]/gu, "") || word.trim();
}

function rounded(seconds) {
  return Math.round(seconds * 1000) / 1000;
}
