/* Thousands of points on a canvas: what WebGL would be for, which the policy of the page forbids.

   atlas.dots({label, x, y, log, colors, hover(i), open(i), selected, threshold, titles: [x, y], square}) -> {el, update}
   x, y: arrays, null where a point has no place; log: x is shown by its logarithm; colors: a CSS colour each.
   hover: nodes that tell of a point; open: it was chosen; threshold: a dashed line at this y, with its text.
   The wheel and + − zoom, dragging moves, 0 and a double click show all again; arrow keys go from point to point, Enter
   opens. The table beside it is the same in words. */
"use strict";
(() => {
  const { h } = atlas;
  const NEAR = 14, PAD = { left: 46, right: 12, top: 10, bottom: 34 };

  function ticks(low, high, log) {
    if (log) {
      const all = [];
      for (let e = Math.floor(low); e <= Math.ceil(high); e++) all.push(e);
      return all.filter((e) => e >= low - 1e-9 && e <= high + 1e-9).map((e) => [e, e < -3 ? `1e${e}` : String(10 ** e)]);
    }
    const step = 10 ** Math.floor(Math.log10((high - low) / 3 || 1));
    const by = [1, 2, 5].map((m) => m * step).find((s) => (high - low) / s <= 6) || 10 * step;
    const all = [];
    for (let v = Math.ceil(low / by) * by; v <= high + 1e-9; v += by) all.push([v, atlas.number(Number(v.toFixed(9)))]);
    return all;
  }

  function dots(given) {
    let options = given, view = null, at = -1, shown = [], grid = null, pointers = new Map(), moved = false;
    const canvas = h("canvas", { tabindex: "0", role: "img", "aria-label": given.label });
    const tip = h("div", { class: "dots-tip", role: "status" });
    const el = h("div", { class: "dots" }, canvas, tip);
    const place = (v) => (options.log ? Math.log10(v) : v);

    function extent() {
      const xs = [], ys = [];
      shown = [];
      for (let i = 0; i < options.x.length; i++) {
        const x = options.x[i], y = options.y[i];
        if (x == null || y == null || (options.log && x <= 0)) continue;
        shown.push(i);
        xs.push(place(x));
        ys.push(y);
      }
      const range = (values, fixed) => {
        if (fixed) return fixed;
        let low = Infinity, high = -Infinity;
        for (const v of values) { if (v < low) low = v; if (v > high) high = v; }
        if (!(high > low)) { low -= 0.5; high += 0.5; }
        const margin = (high - low) * 0.04;
        return [low - margin, high + margin];
      };
      return { x: range(xs), y: range(ys, options.yrange) };
    }
    function size() {
      const ratio = window.devicePixelRatio || 1, box = canvas.getBoundingClientRect();
      canvas.width = Math.max(1, Math.round(box.width * ratio));
      canvas.height = Math.max(1, Math.round(box.height * ratio));
      return { w: box.width, h: box.height, ratio };
    }
    function frame(box) {
      const plain = options.plain, left = plain ? 8 : PAD.left, bottom = plain ? 8 : PAD.bottom;
      return { left, top: PAD.top, w: Math.max(1, box.w - left - PAD.right), h: Math.max(1, box.h - PAD.top - bottom) };
    }
    const toScreen = (i, f) => [
      f.left + ((place(options.x[i]) - view.x[0]) / (view.x[1] - view.x[0])) * f.w,
      f.top + (1 - (options.y[i] - view.y[0]) / (view.y[1] - view.y[0])) * f.h,
    ];
    function draw() {
      if (!el.isConnected) return;
      const box = size(), f = frame(box), c = canvas.getContext("2d");
      if (!box.w || !box.h) return;
      c.setTransform(box.ratio, 0, 0, box.ratio, 0, 0);
      c.clearRect(0, 0, box.w, box.h);
      c.font = "12px system-ui, sans-serif";
      const line = atlas.colour("line"), soft = atlas.colour("soft"), ink = atlas.colour("ink");
      c.strokeStyle = line;
      c.lineWidth = 1;
      if (!options.plain) axes(c, f, line, soft);
      c.save();
      c.beginPath();
      c.rect(f.left, f.top, f.w, f.h);
      c.clip();
      if (options.threshold != null) {
        const y = f.top + (1 - (options.threshold - view.y[0]) / (view.y[1] - view.y[0])) * f.h;
        c.strokeStyle = ink;
        c.setLineDash([5, 4]);
        c.beginPath();
        c.moveTo(f.left, y);
        c.lineTo(f.left + f.w, y);
        c.stroke();
        c.setLineDash([]);
      }
      grid = new Map();
      const radius = shown.length > 4000 ? 1.7 : shown.length > 800 ? 2.4 : 3.6;
      c.globalAlpha = shown.length > 4000 ? 0.75 : 0.9;
      for (const i of shown) {
        const [x, y] = toScreen(i, f);
        if (x < f.left - 4 || x > f.left + f.w + 4 || y < f.top - 4 || y > f.top + f.h + 4) continue;
        const key = `${Math.floor(x / NEAR)},${Math.floor(y / NEAR)}`;
        if (!grid.has(key)) grid.set(key, []);
        grid.get(key).push([i, x, y]);
        c.fillStyle = options.colors[i];
        c.beginPath();
        c.arc(x, y, radius, 0, 2 * Math.PI);
        c.fill();
      }
      c.globalAlpha = 1;
      for (const i of new Set([options.selected, at])) {
        if (i == null || i < 0 || options.x[i] == null || options.y[i] == null) continue;
        const [x, y] = toScreen(i, f);
        c.strokeStyle = ink;
        c.lineWidth = 2;
        c.beginPath();
        c.arc(x, y, radius + 4, 0, 2 * Math.PI);
        c.stroke();
      }
      c.restore();
      el.dataset.drawn = String(shown.length);
    }
    function axes(c, f, line, soft) {
      c.fillStyle = soft;
      c.textAlign = "center";
      for (const [v, text] of ticks(view.x[0], view.x[1], options.log)) {
        const x = f.left + ((v - view.x[0]) / (view.x[1] - view.x[0])) * f.w;
        c.beginPath(); c.moveTo(x, f.top); c.lineTo(x, f.top + f.h); c.stroke();
        c.fillText(text, x, f.top + f.h + 15);
      }
      c.fillText(options.titles[0], f.left + f.w / 2, f.top + f.h + 30);
      c.textAlign = "right";
      for (const [v, text] of ticks(view.y[0], view.y[1], false)) {
        const y = f.top + (1 - (v - view.y[0]) / (view.y[1] - view.y[0])) * f.h;
        c.beginPath(); c.moveTo(f.left, y); c.lineTo(f.left + f.w, y); c.stroke();
        c.fillText(text, f.left - 6, y + 4);
      }
      c.save();
      c.translate(11, f.top + f.h / 2);
      c.rotate(-Math.PI / 2);
      c.textAlign = "center";
      c.fillText(options.titles[1], 0, 0);
      c.restore();
    }
    function nearest(x, y, within) {
      let best = -1, distance = (within || NEAR) ** 2;
      const [column, row] = [Math.floor(x / NEAR), Math.floor(y / NEAR)];
      for (let a = -1; a <= 1; a++) for (let b = -1; b <= 1; b++) {
        for (const [i, px, py] of (grid && grid.get(`${column + a},${row + b}`)) || []) {
          const d = (px - x) ** 2 + (py - y) ** 2;
          if (d < distance) { best = i; distance = d; }
        }
      }
      return best;
    }
    function point(i) {
      if (i === at) return;
      at = i;
      draw();
      tip.replaceChildren(...(i < 0 ? [] : [options.hover(i)].flat()));
      canvas.style.cursor = i < 0 ? "" : "pointer";
      if (i < 0) return;
      const [x, y] = toScreen(i, frame(canvas.getBoundingClientRect().width ? { w: canvas.clientWidth, h: canvas.clientHeight } : { w: 1, h: 1 }));
      const width = tip.offsetWidth, left = Math.min(Math.max(0, x + 12), Math.max(0, canvas.clientWidth - width));
      tip.style.left = `${left}px`;
      tip.style.top = `${y + tip.offsetHeight + 16 > canvas.clientHeight ? Math.max(0, y - tip.offsetHeight - 10) : y + 12}px`;
    }
    function zoom(factor, x, y) {
      const f = frame({ w: canvas.clientWidth, h: canvas.clientHeight });
      const px = (x - f.left) / f.w, py = 1 - (y - f.top) / f.h;
      for (const [name, share] of [["x", px], ["y", py]]) {
        const [low, high] = view[name], centre = low + (high - low) * share;
        view[name] = [centre - (centre - low) * factor, centre + (high - centre) * factor];
      }
      point(-1);
      draw();
    }
    function whole() { view = extent(); point(-1); draw(); }
    const where = (event) => { const box = canvas.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
    canvas.addEventListener("pointerdown", (event) => {
      pointers.set(event.pointerId, where(event));
      moved = false;
    });
    canvas.addEventListener("pointermove", (event) => {
      const now = where(event), before = pointers.get(event.pointerId);
      if (!before) { point(nearest(...now)); return; }
      // on a touch screen one finger scrolls the page, so only a mouse drags
      if (event.pointerType !== "mouse") return;
      const f = frame({ w: canvas.clientWidth, h: canvas.clientHeight });
      const dx = ((now[0] - before[0]) / f.w) * (view.x[1] - view.x[0]), dy = ((now[1] - before[1]) / f.h) * (view.y[1] - view.y[0]);
      if (Math.hypot(now[0] - before[0], now[1] - before[1]) < 3 && !moved) return;
      moved = true;
      view = { x: view.x.map((v) => v - dx), y: view.y.map((v) => v + dy) };
      pointers.set(event.pointerId, now);
      point(-1);
      draw();
    });
    canvas.addEventListener("pointerup", (event) => {
      const now = where(event), own = pointers.delete(event.pointerId);
      if (!own || moved) return;
      const i = nearest(...now, event.pointerType === "mouse" ? NEAR : 2 * NEAR);
      if (i < 0) return;
      // a finger cannot point first: its first touch tells, the second opens
      if (event.pointerType === "mouse" || i === options.touched) options.open(i);
      else { options.touched = i; point(i); }
    });
    canvas.addEventListener("pointerleave", () => { pointers.clear(); if (document.activeElement !== canvas) point(-1); });
    canvas.addEventListener("wheel", (event) => {
      // without a key the wheel scrolls the page
      if (!event.ctrlKey && !event.metaKey && document.activeElement !== canvas) return;
      event.preventDefault();
      zoom(event.deltaY > 0 ? 1.15 : 1 / 1.15, ...where(event));
    }, { passive: false });
    canvas.addEventListener("dblclick", whole);
    canvas.addEventListener("blur", () => point(-1));
    canvas.addEventListener("keydown", (event) => {
      const arrow = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      const middle = [canvas.clientWidth / 2, canvas.clientHeight / 2];
      if (arrow) step(...arrow);
      else if (event.key === "Enter" && at >= 0) options.open(at);
      else if (event.key === "+" || event.key === "=") zoom(1 / 1.3, ...middle);
      else if (event.key === "-") zoom(1.3, ...middle);
      else if (event.key === "0") whole();
      else if (event.key === "Escape") { point(-1); canvas.blur(); } else return;
      event.preventDefault();
      event.stopPropagation();
    });
    function step(dx, dy) {
      const f = frame({ w: canvas.clientWidth, h: canvas.clientHeight });
      const [x, y] = at < 0 ? [f.left + f.w / 2, f.top + f.h / 2] : toScreen(at, f);
      let best = -1, cost = Infinity;
      for (const cell of grid.values()) for (const [i, px, py] of cell) {
        const along = (px - x) * dx + (py - y) * dy, aside = Math.abs((px - x) * dy) + Math.abs((py - y) * dx);
        if (i !== at && (at < 0 || along > 0.5) && Math.abs(along) + 3 * aside < cost) { cost = Math.abs(along) + 3 * aside; best = i; }
      }
      if (best >= 0) point(best);
    }
    const watch = new ResizeObserver(() => { if (view) draw(); });
    watch.observe(el);
    function update(changes, keep) {
      options = { ...options, ...changes };
      if (!keep || !view) view = extent();
      at = -1;
      tip.replaceChildren();
      draw();
    }
    view = extent();
    return { el, update, all: whole, zoom: (factor) => zoom(factor, canvas.clientWidth / 2, canvas.clientHeight / 2) };
  }
  atlas.dots = dots;
})();
