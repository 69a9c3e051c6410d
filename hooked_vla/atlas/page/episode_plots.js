/* Plots of an episode over its steps, drawn as SVG so that their cursors move with every frame of a film. Each gives
   {el, at(step)}. A side is "own" (the episode) or "other" (the one beside it): a colour, and a line or dashes. */
"use strict";
window.atlasEpisodes = window.atlasEpisodes || {};
(() => {
  const { h, s, number } = atlas;
  const PAD = { left: 46, right: 10, top: 8, bottom: 22 };

  function ticks(low, high, n) {
    const raw = (high - low) / n, power = 10 ** Math.floor(Math.log10(raw || 1));
    const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= raw) || 1;
    const found = [];
    for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-6; at += step) found.push(Number(at.toFixed(10)));
    return found;
  }
  function range(values) {
    let low = Infinity, high = -Infinity;
    for (const value of values) {
      if (value == null) continue;
      if (value < low) low = value;
      if (value > high) high = value;
    }
    if (low > high) return [0, 1];
    const margin = (high - low || Math.abs(high) || 1) * 0.06;
    return [low - margin, high + margin];
  }
  // redrawn when its width changes: text keeps its size on a phone
  function responsive(el, draw) {
    let width = 0;
    const watch = new ResizeObserver(() => {
      const now = Math.round(el.clientWidth);
      if (now && now !== width) { width = now; draw(width); }
    });
    watch.observe(el);
  }

  /* lines over steps. series: [{side, values, name}]; pick(step): the reader points at a step. */
  function lines({ title, unit, series, n, differs, pick, height = 132 }) {
    const box = h("div", { class: "ep-lines" });
    const reading = h("span", { class: "soft ep-reading" });
    const el = h("figure", { class: "ep-plot" }, h("figcaption", {}, title, unit ? h("span", { class: "soft" }, ` ${unit}`) : null,
      " ", reading), box);
    const [low, high] = range(series.flatMap((each) => each.values));
    let x = () => 0, y = () => 0, cursor = null, dots = [], step = 0;
    function draw(width) {
      const right = width - PAD.right, bottom = height - PAD.bottom;
      x = (at) => PAD.left + ((right - PAD.left) * at) / Math.max(1, n);
      y = (value) => bottom - ((bottom - PAD.top) * (value - low)) / (high - low);
      const grid = ticks(low, high, 3).map((at) => [s("line", { x1: PAD.left, x2: right, y1: y(at), y2: y(at), class: "ep-grid" }),
        s("text", { x: PAD.left - 6, y: y(at) + 4, class: "ep-tick", "text-anchor": "end" }, number(at))]);
      const below = ticks(0, n, Math.max(2, width / 90)).filter(Number.isInteger).map((at) =>
        s("text", { x: x(at), y: height - 6, class: "ep-tick", "text-anchor": "middle" }, String(at)));
      const paths = series.map((each) => s("path", { class: `ep-line side-${each.side}`, d: each.values
        .map((value, i) => (value == null ? "" : `${i && each.values[i - 1] != null ? "L" : "M"}${x(i).toFixed(1)} ${y(value).toFixed(1)}`)).join("") }));
      dots = series.map((each) => s("circle", { r: 3.5, class: `ep-dot side-${each.side}` }));
      cursor = s("line", { y1: PAD.top, y2: bottom, class: "ep-cursor" });
      const mark = differs == null ? null : s("line", { x1: x(differs), x2: x(differs), y1: PAD.top, y2: bottom, class: "ep-differs" });
      box.replaceChildren(s("svg", { width, height, role: "img", "aria-label": `${title} over steps; the values at the step are in the table below` },
        grid, below, mark, paths, cursor, dots));
      at(step);
    }
    function at(now) {
      step = now;
      if (!cursor) return;
      cursor.setAttribute("x1", x(now));
      cursor.setAttribute("x2", x(now));
      series.forEach((each, i) => {
        const value = each.values[now];
        dots[i].style.display = value == null ? "none" : "";
        if (value != null) { dots[i].setAttribute("cx", x(now)); dots[i].setAttribute("cy", y(value)); }
      });
      reading.replaceChildren(...[...series].reverse().map((each) => h("span", { class: `ep-value side-${each.side}` }, each.values[now] == null ? "–" : number(each.values[now]))));
    }
    pointed(box, (px) => pick(Math.round(((px - PAD.left) / Math.max(1, box.clientWidth - PAD.left - PAD.right)) * n)));
    responsive(box, draw);
    return { el, at };
  }
  function pointed(box, pick) {
    const tell = (event) => pick(event.clientX - box.getBoundingClientRect().left);
    box.addEventListener("pointerdown", (event) => { if (event.button === 0) { box.setPointerCapture(event.pointerId); tell(event); } });
    box.addEventListener("pointermove", (event) => { if (event.buttons & 1) tell(event); });
  }

  /* from above: the hand's way, and where the objects are. sides: [{side, tracks}] */
  function topView({ sides, unit }) {
    const box = h("div", { class: "ep-top" });
    const el = h("figure", { class: "ep-plot" }, h("figcaption", {}, "From above", h("span", { class: "soft" }, ` x right, y up, ${unit}`)), box);
    const all = (axis) => sides.flatMap(({ tracks }) => [...(tracks.hand ? tracks.hand[axis] : []), ...tracks.objects.flatMap((each) => each[axis] || [])]);
    const [x0, x1] = range(all("x")), [y0, y1] = range(all("y"));
    let place = null, moving = [], step = 0;
    function draw(width) {
      const height = Math.min(460, Math.max(220, Math.round((width * (y1 - y0)) / (x1 - x0)))), edge = 26;
      const scale = Math.min((width - 2 * edge) / (x1 - x0), (height - 2 * edge) / (y1 - y0));
      const left = (width - scale * (x1 - x0)) / 2, top = (height - scale * (y1 - y0)) / 2;
      place = (x, y) => [left + (x - x0) * scale, height - top - (y - y0) * scale];
      const grid = [...ticks(x0, x1, 4).map((v) => [place(v, y0), place(v, y1), number(v), "x"]), ...ticks(y0, y1, 4).map((v) => [place(x0, v), place(x1, v), number(v), "y"])]
        .map(([from, to, text, axis]) => [s("line", { x1: from[0], y1: from[1], x2: to[0], y2: to[1], class: "ep-grid" }),
          s("text", axis === "x" ? { x: from[0], y: height - 4, class: "ep-tick", "text-anchor": "middle" } : { x: 2, y: from[1] + 4, class: "ep-tick" }, text)]);
      moving = [];
      const drawn = sides.map(({ side, tracks }, i) => [tracks.objects.map((object) => thing(object, side, i)), tracks.hand && hand(tracks.hand, side)]);
      box.replaceChildren(s("svg", { width, height, role: "img", "aria-label": "The way of the hand and the objects from above; places at the step are in the table below" },
        grid, drawn.reverse()));
      at(step);
    }
    const line = (xs, ys) => xs.map((x, i) => `${i ? "L" : "M"}${place(x, ys[i]).map((v) => v.toFixed(1)).join(" ")}`).join("");
    function thing(object, side, i) {
      if (!object.x || !object.y || (object.fixed && i)) return null;
      const fill = CSS.supports("color", object.name) ? object.name : "var(--soft)";
      const size = object.fixed ? 9 : 6;
      const mark = s("g", { class: `ep-object side-${side}` }, s("rect", { x: -size, y: -size, width: 2 * size, height: 2 * size, rx: 1.5,
        style: object.fixed ? { fill: "none", stroke: fill, strokeWidth: "2.5px" } : { fill, stroke: "var(--ink)" } }),
      object.fixed || !i ? s("text", { x: size + 3, y: object.fixed ? -size : 4, class: "ep-tick" }, object.name) : null);
      const way = object.fixed ? null : s("path", { d: line(object.x, object.y), class: `ep-way side-${side}`, style: { stroke: fill } });
      moving.push((now) => {
        const k = object.fixed ? 0 : Math.min(now, object.x.length - 1);
        mark.setAttribute("transform", `translate(${place(object.x[k], object.y[k]).map((v) => v.toFixed(1)).join(" ")})`);
      });
      return [way, mark];
    }
    function hand(track, side) {
      const done = s("path", { class: `ep-line side-${side}` }), dot = s("circle", { r: 5, class: `ep-dot side-${side}` });
      moving.push((now) => {
        const k = Math.min(now, track.x.length - 1);
        done.setAttribute("d", line(track.x.slice(0, k + 1), track.y.slice(0, k + 1)));
        const [px, py] = place(track.x[k], track.y[k]);
        dot.setAttribute("cx", px);
        dot.setAttribute("cy", py);
      });
      return [s("path", { d: line(track.x, track.y), class: `ep-rest side-${side}` }), done, dot];
    }
    function at(now) {
      step = now;
      if (place) moving.forEach((move) => move(now));
    }
    responsive(box, draw);
    return { el, at };
  }

  /* ribbons over steps: one row a side. rows: [{side, label, values}]; words: value -> text or "" for none */
  function ribbons({ title, rows, n, words, order, differs, pick }) {
    const seen = order || [...new Set(rows.flatMap((row) => row.values))].filter((value) => words(value));
    const tone = (value) => atlas.palette[Math.max(0, seen.indexOf(value)) % atlas.palette.length];
    const cursors = [], says = [];
    const bodies = rows.map((row) => {
      const runs = [];
      row.values.slice(0, n + 1).forEach((value, i) => {
        const last = runs[runs.length - 1];
        if (last && last.value === value) last.to = i + 1;
        else runs.push({ value, from: i, to: i + 1 });
      });
      const text = runs.filter((run) => words(run.value)).map((run) => `${words(run.value)} ${run.from}–${run.to - 1}`).join(", ");
      const cursor = h("div", { class: "ep-ribbon-cursor" });
      cursors.push(cursor);
      const bar = h("div", { class: "ep-ribbon", role: "img", "aria-label": `${row.label}: ${text || "none"}` },
        runs.map((run) => words(run.value) && h("span", { class: "ep-run", title: `${words(run.value)}, steps ${run.from}–${run.to - 1}`, style: {
          left: `${(100 * run.from) / (n + 1)}%`, width: `${(100 * (run.to - run.from)) / (n + 1)}%`, background: tone(run.value) } })),
        differs == null ? null : h("div", { class: "ep-ribbon-differs", style: { left: `${(100 * differs) / (n + 1)}%` } }), cursor);
      pointed(bar, (px) => pick(Math.floor((px / Math.max(1, bar.clientWidth)) * (n + 1))));
      const said = h("span", { class: "soft ep-said" });
      says.push([said, row]);
      return h("div", { class: "ep-ribbon-row" }, h("span", { class: `ep-side side-${row.side}` }, row.label), bar, said);
    });
    const legend = seen.length > 1 ? h("p", { class: "ep-legend" }, seen.map((value) => h("span", {}, h("i", { style: { background: tone(value) } }), words(value)))) : null;
    const el = h("figure", { class: "ep-plot" }, h("figcaption", {}, title), bodies, legend);
    function at(now) {
      cursors.forEach((cursor) => { cursor.style.left = `${(100 * (now + 0.5)) / (n + 1)}%`; });
      says.forEach(([said, row]) => { said.textContent = row.values[now] == null ? "over" : words(row.values[now]) || "–"; });
    }
    return { el, at };
  }
  Object.assign(window.atlasEpisodes, { lines, topView, ribbons });
})();
