// Runs before the first paint, to avoid a flash of the wrong theme.
const theme = (() => {
  try {
    return localStorage.getItem("npqwen.theme");
  } catch {
    return null; // storage is disabled
  }
})();
if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
