/* Tables as heat maps: HTML tables, so that every cell can be read out, focused and followed to its rows.
   window.atlasHeat = {scaleOf(column), cell(...), measures(...), grid(...), labelOf(row), badgesOf(text)}. */
"use strict";
(() => {
  const { h, number, interval, shade } = atlas;
  const CONTROL = /^(noise|white noise|random( donor| head| \d+)?|random|shuffled|sham|rerun|own values|same scene|identity)\b/i;
  const BASELINE = /^(baseline|\(nothing\)|source prompt, no injection|source prompt\b)/i;

  /* Colours say how far a value is from 0: shares from 0 to 1, what has a sign about 0, all else to its largest. */
  function scaleOf(column) {
    const { low, high } = column;
    if (low == null || high == null) return null;
    if (low < 0) {
      const far = Math.max(-low, high);
      return { low: -far, high: far, diverging: true };
    }
    return { low: 0, high: high <= 1 && high > 0.2 ? 1 : high || 1, diverging: false };
  }
  const kindOf = (label) => (BASELINE.test(label) ? "baseline" : CONTROL.test(label) ? "control" : null);

  /* One number: its interval, and what it would be without the effect, in smaller type below. */
  function cell({ value, low, high, beside, scale, href, name, note }) {
    if (value == null) return h("td", { class: "blank" });
    const lines = [h("b", {}, number(value))];
    if (low != null && high != null) lines.push(h("small", {}, `${number(low)} – ${number(high)}`));
    for (const [what, other] of beside || []) if (other != null) lines.push(h("small", {}, `${what} ${number(other)}`));
    if (note) lines.push(h("small", {}, note));
    const spoken = [`${name}: ${number(value)}`, low != null && high != null ? `interval ${interval(low, high)}` : null,
      ...(beside || []).filter(([, other]) => other != null).map(([what, other]) => `${what} ${number(other)}`), note];
    return h("td", { class: "heat", style: scale ? shade(value, scale.low, scale.high, scale.diverging) : {} },
      h("a", { href, "aria-label": spoken.filter(Boolean).join(", ") }, lines));
  }

  /* The control of an arm: "noise: X", or "noise X" beside "donor X". */
  function controlsOf(labels) {
    const found = new Map();
    labels.forEach((label, at) => {
      const match = /^(noise|white noise|random donor|random \d+|own values|same scene|source prompt):? (.+)$/i.exec(label);
      if (!match) return;
      labels.forEach((other, i) => {
        if (i !== at && !kindOf(other) && (other === match[2] || other.endsWith(` ${match[2]}`))) {
          found.set(i, [...(found.get(i) || []), [match[1].toLowerCase(), at]]);
        }
      });
    });
    return found;
  }

  const badgesOf = (text) => (text === "replay" || text === "dead end" ? atlas.badge(text) :
    text ? atlas.badge("plain", text) : null);

  /* One row a row of the table, one column a measure. about: the table; page: its rows; rowHref(values) -> address. */
  function measures({ about, page, caption, rowHref }) {
    const at = new Map(about.columns.map((column, i) => [column.name, i]));
    const value = (row, name) => (at.has(name) ? row[at.get(name)] : null);
    const keys = about.columns.filter((c) => c.role === "key" && c.distinct > 1 && c.distinct > 0);
    const shown = keys.length ? keys : about.columns.filter((c) => c.role === "key").slice(0, 1);
    const label = about.columns.find((c) => c.role === "label");
    const counts = about.columns.filter((c) => ["count", "p", "flag"].includes(c.role));
    const numbers = about.columns.filter((c) => c.role === "measure");
    const ends = (name, role) => (about.columns.find((c) => c.of === name && c.role === role) || {}).name;
    const arm = shown.find((c) => c.name === "arm") || shown[shown.length - 1];
    const labels = page.rows.map((row) => String(arm ? value(row, arm.name) ?? "" : ""));
    const controls = controlsOf(labels);
    const head = h("tr", {}, [...shown.map((c) => c.name), label ? "label" : null, ...numbers.map((c) => c.name),
      ...counts.map((c) => c.name)].filter(Boolean).map((name) => h("th", { scope: "col" }, name.replaceAll("_", " "))));
    const body = page.rows.map((row, i) => {
      const where = Object.fromEntries(shown.map((c) => [c.name, value(row, c.name)]));
      const kind = kindOf(labels[i]);
      const named = shown.map((c) => value(row, c.name)).filter((v) => v != null && v !== "").join(", ");
      return h("tr", { class: kind ? "reference" : null },
        shown.map((c, j) => h(j === 0 ? "th" : "td", { scope: j === 0 ? "row" : null, class: "name" },
          number(value(row, c.name)), c === arm && kind ? [" ", atlas.badge(kind)] : null)),
        label ? h("td", {}, badgesOf(value(row, label.name))) : null,
        numbers.map((c) => cell({
          value: value(row, c.name), low: value(row, ends(c.name, "low")), high: value(row, ends(c.name, "high")),
          beside: [
            ...about.columns.filter((r) => r.role === "reference" && r.of === c.name)
              .map((r) => [r.name.replaceAll("_", " "), value(row, r.name)]),
            ...(controls.get(i) || []).map(([what, j]) => [what, value(page.rows[j], c.name)]),
          ],
          scale: scaleOf(c), href: rowHref(where), name: `${c.name.replaceAll("_", " ")} of ${named || "this row"}`,
        })),
        counts.map((c) => h("td", { class: "number" }, number(value(row, c.name)))));
    });
    return framed(caption, page.file, head, body, "heat-table measures");
  }

  /* A measure over two keys. found: a grid's answer; column: the measure's; href(row, column) -> address. */
  function grid({ found, column, caption, href }) {
    const cells = new Map(found.cells.map((each) => [`${each[0]},${each[1]}`, each]));
    const scale = scaleOf(column);
    const shown = (value) => (value == null || value === "" ? "(none)" : number(value));
    const head = h("tr", {}, h("th", { scope: "col" }, `${found.row_key} \\ ${found.column_key}`),
      found.columns.map((name) => h("th", { scope: "col" }, shown(name))));
    const body = found.rows.map((name, i) => h("tr", { class: kindOf(String(name)) ? "reference" : null },
      h("th", { scope: "row", class: "name" }, shown(name)),
      found.columns.map((other, j) => {
        const [, , value, n, low, high] = cells.get(`${i},${j}`) || [];
        return cell({ value, low, high, scale, href: href(name, other), note: n > 1 ? `mean of ${n}` : null,
          name: `${found.measure} of ${shown(name)}, ${shown(other)}` });
      })));
    return framed(caption, found.file, head, body, "heat-table");
  }

  function framed(caption, file, head, body, kind) {
    const table = h("table", { class: kind }, h("caption", {}, caption, " ", atlas.source(file)),
      h("thead", {}, head), h("tbody", {}, body));
    const region = h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption }, table);
    // arrows go from cell to cell
    region.addEventListener("keydown", (event) => {
      const [dy, dx] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key] || [];
      const from = document.activeElement.closest("td");
      if (dx === undefined || !from) return;
      event.preventDefault();
      let row = from.parentElement, at = from.cellIndex;
      do {
        row = dy > 0 ? row.nextElementSibling : dy < 0 ? row.previousElementSibling : row;
        at += dx;
        const link = row && row.cells[at] && row.cells[at].querySelector("a");
        if (link) { link.focus(); return; }
      } while (row && row.cells[at]);
    });
    return region;
  }
  window.atlasHeat = { scaleOf, cell, measures, grid, kindOf, badgesOf, framed };
})();
