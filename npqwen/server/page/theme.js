// Runs before the first paint, so that a chosen theme does not flash in.
const theme = (() => {
  try {
    return localStorage.getItem("npqwen.theme");
  } catch {
    return null; // storage is switched off
  }
})();
if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
