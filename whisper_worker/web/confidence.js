/** How far a line or a word can be trusted: 0 sure, 1 unsure, 2 doubted. */

const REASONS = {
  loop: [2, "the text repeats itself"],
  text_over_silence: [2, "no speech was heard here"],
  low_logprob: [2, "the model was unsure of it"],
  prompt_echo: [2, "the text repeats the prompt"],
  fallback: [1, "a first attempt failed"],
};

/** Mean probability of a token under which a line counts as unsure, and as doubted. */
const LINE_LIMITS = [0.55, 0.37];
const WORD_LIMITS = [0.5, 0.25];

/** Level of a segment, and the reasons in words. */
export function lineDoubt(segment) {
  const found = (segment.flags ?? []).map((flag) => REASONS[flag] ?? [1, flag]);
  const mean = Math.exp(segment.avg_logprob);
  const level = Math.max(levelUnder(mean, LINE_LIMITS), ...found.map(([level]) => level));
  const reasons = found.map(([, reason]) => reason);
  if (level) reasons.push(`mean confidence ${percent(mean)}`);
  return { level, reasons };
}

export function wordDoubt(word) {
  return levelUnder(word.probability, WORD_LIMITS);
}

export function percent(share) {
  return `${Math.round(share * 100)} %`;
}

function levelUnder(value, [unsure, doubted]) {
  return value < doubted ? 2 : value < unsure ? 1 : 0;
}
