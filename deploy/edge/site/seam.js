/**
 * Where a new connection takes over from one that broke.
 *
 * The last line is sent again, so that the server hears what follows in its context; its words come back a
 * second time, with slightly other times and perhaps cut otherwise. Those that stand already are left out.
 */

/** Two readings of one word end at most this far apart, in seconds. */
const NEAR = 0.75;

/**
 * @typedef {{word: string, start: number, end: number}} Word times in seconds of the whole recording
 * @typedef {{at: number, words: Word[]}} Seam the end of what stands, and its last words
 * @param {Word[]} words of one segment of the new connection, in order
 * @param {Seam | null} seam
 * @returns {Word[]} those that are new
 */
export function fresh(words, seam) {
  if (!seam || !words.length || words[0].start > seam.at + NEAR) return words;
  // By their times: whatever has its middle before the seam was said before it.
  let n = words.findIndex((one) => (one.start + one.end) / 2 >= seam.at);
  if (n < 0) n = words.length;
  // By their texts, where the last word that stands is found again close by: the longest run wins.
  let longest = 0;
  const byTime = n;
  for (let end = 1; end <= words.length; end++) {
    if (Math.abs(words[end - 1].end - seam.at) > NEAR) continue;
    const run = commonEnd(words.slice(0, end), seam.words);
    const better = run > longest || (run === longest && run && Math.abs(end - byTime) < Math.abs(n - byTime));
    if (better) [longest, n] = [run, end];
  }
  return words.slice(n);
}

function commonEnd(some, others) {
  let n = 0;
  while (n < some.length && n < others.length && same(some.at(-1 - n).word, others.at(-1 - n).word)) n++;
  return n;
}

function same(one, other) {
  return folded(one) === folded(other) && folded(one) !== "";
}

function folded(word) {
  return word.toLowerCase().replace(/[^\p{L}\p{N}]/gu, "");
}
