"use strict"; // the box for a text of one's own: only a page that `saenb explore --serve` sends has it
(() => {
  let answer = null;
  const box = element("textarea", { id: "text", rows: 2, maxLength: 2000, placeholder: "your own text" }), button = element("button", { type: "submit", className: "save", textContent: "try" });
  box.setAttribute("aria-label", "your own text");
  const said = element("span", { className: "numbers", role: "status" }), found = element("div", { id: "found" }), form = element("form", { id: "try" }, box, button, said);
  box.style.cssText = "flex: 1; min-width: 14em; font: inherit; background: var(--back); color: inherit; border: 1px solid var(--line); border-radius: 4px;";
  found.style.cssText = "margin-top: 6px; max-height: 7em; overflow: auto;";
  document.querySelector("header").append(form, found);

  async function ask(feature) {
    const response = await fetch("try", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ text: box.value, feature }) });
    const told = await response.json();
    if (!response.ok) throw new Error(told.error);
    return told;
  }

  form.addEventListener("submit", async event => {
    event.preventDefault();
    said.textContent = "reading ...";
    try {
      answer = await ask(chosen);
      said.textContent = answer.tokens.length + " tokens; the features that they activate most, of what they ever reach:";
      found.replaceChildren(...answer.strongest.map(({ feature, share }) => element("button", { className: "near", type: "button", textContent: `${feature} ${called(feature)} (${Math.round(100 * share)} %)`, onclick: () => choose(feature) })));
      choose(answer.strongest.length ? answer.strongest[0].feature : chosen);
    } catch (error) { said.textContent = error.message; }
  });

  window.tried = i => { // what the text does to a feature, shown above its own texts
    if (!answer) return [];
    const line = element("div", { className: "context", id: "mine" }), values = answer.values[i];
    if (!values) { ask(i).then(told => { Object.assign(answer.values, told.values); if (chosen === i) choose(i); }).catch(error => { said.textContent = error.message; }); return []; }
    answer.tokens.forEach((token, n) => {
      const a = Math.min(1, values[n] / Math.max(A.largest[i], 1e-9)), b = element("b", { textContent: token.replaceAll("\n", "↵"), title: values[n].toPrecision(3) });
      if (a > 0) paint(b, a);
      line.append(b);
    });
    return [element("h3", { textContent: "In your text" }), line];
  };
})();
