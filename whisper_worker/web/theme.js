// Loaded before anything is painted; everything else waits for the document.
"use strict";

(() => {
  const chosen = localStorage.getItem("theme");
  if (chosen) document.documentElement.dataset.theme = chosen;
})();
