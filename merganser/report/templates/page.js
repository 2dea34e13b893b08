(() => {
  const tip = document.getElementById("tip");
  const words = (target) => {
    const cell = target.closest("table.heat tbody td");
    if (cell) {
      const row = cell.parentElement.cells[0].textContent;
      const column = cell.closest("table").tHead.rows[0].cells[cell.cellIndex].textContent;
      return `row ${row}, column ${column}: ${cell.textContent} nats`;
    }
    const marked = target.closest("[data-tip]");
    return marked && marked.dataset.tip;
  };
  const show = (event) => {
    const text = event.target.closest && words(event.target);
    tip.hidden = !text;
    if (!text) return;
    tip.textContent = text;
    const { width, height } = tip.getBoundingClientRect();
    const edge = document.documentElement.clientWidth - width - 8;
    const above = event.clientY - height - 14;
    tip.style.left = `${Math.max(8, Math.min(event.clientX - width / 2, edge))}px`;
    tip.style.top = `${above > 8 ? above : event.clientY + 18}px`;
  };
  addEventListener("pointerover", show);
  addEventListener("pointerdown", show);
  addEventListener("scroll", () => { tip.hidden = true; }, { capture: true, passive: true });

  const theme = document.getElementById("theme");
  const themes = ["auto", "light", "dark"];
  let at = 0;
  theme.hidden = false;
  theme.addEventListener("click", () => {
    at = (at + 1) % themes.length;
    theme.textContent = `theme: ${themes[at]}`;
    document.documentElement.style.colorScheme = at ? themes[at] : "";
  });

  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => { part.open = true; }));
})();
