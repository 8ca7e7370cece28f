/** The languages that Whisper knows, by code. A test holds this list to the worker's own. */
export const CODES =
  ("en zh de es ru ko fr ja pt tr pl ca nl ar sv it id hi fi vi he uk el ms cs ro da hu ta no th ur hr bg lt la mi " +
    "ml cy sk te fa lv bn sr az sl kn et mk br eu is hy ne mn bs kk sq sw gl mr pa si km sn yo so af oc ka be tg sd " +
    "gu am yi lo uz fo ht ps tk nn mt sa lb my bo tl mg as tt haw ln ha ba jw su yue").split(" ");

/** Languages written without blanks: the service splits their words by character. */
export const UNSPACED = new Set(["zh", "ja", "th", "lo", "my", "yue"]);

const names = new Intl.DisplayNames(["en"], { type: "language" });

/** English name of one of Whisper's codes. */
export function languageName(code) {
  return names.of(code === "jw" ? "jv" : code);
}
