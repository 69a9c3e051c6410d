/* One episode beside another of the same start: films and tracks under one scrubber. */
"use strict";
(() => {
  const { h, badge, choose, number, source } = atlas;
  const { lines, topView, ribbons, attention } = window.atlasEpisodes;
  const SPEEDS = [["0.25", "¼ ×"], ["0.5", "½ ×"], ["1", "1 ×"], ["2", "2 ×"], ["4", "4 ×"]];

  const outcome = (episode) => badge(episode.success ? "holds" : "does not hold", episode.success ? "success" : episode.ending || "failure");

  /* which of the cell's episodes stands beside this one where the address does not say */
  function opponent(episode, against) {
    const others = episode.cell.filter((each) => each.episode !== episode.episode);
    if (against === "none") return null;
    return others.find((each) => each.arm === against) || others.find((each) => each.kind === "baseline") || others[0] || null;
  }
  function firstDifference(a, b) {
    const n = Math.min(a.action.length, b.action.length);
    for (let i = 0; i < n; i += 1) if (a.action[i].some((value, k) => value !== b.action[i][k])) return i;
    return a.action.length === b.action.length ? null : n;
  }
  const apart = (a, b, i) => (a.hand && b.hand && a.hand.x[i] != null && b.hand.x[i] != null
    ? Math.hypot(...["x", "y", "z"].filter((axis) => a.hand[axis] && b.hand[axis]).map((axis) => a.hand[axis][i] - b.hand[axis][i])) : null);

  /* a film in its box, and what is said in its place */
  function screen(side) {
    const video = h("video", { muted: true, playsinline: true, preload: "auto", class: "ep-video", hidden: true, "aria-label": `Film of the episode, ${side.label}` });
    video.muted = true;
    const canvas = h("canvas", { class: "ep-overlay", hidden: true, role: "img" });
    const text = h("p", { class: "ep-none soft", role: "status" }, "Replaying the episode for its film …");
    const over = h("span", { class: "ep-over", hidden: true }, "over");
    const el = h("div", { class: "ep-screen" }, video, canvas, text, over);
    let film = null, urls = [], gone = false;
    async function load() {
      const path = `rollouts/${side.rollout}/episode/${side.data.episode}/film`;
      if (!atlas.has(path)) { say("This copy of the page holds films of the first episodes only."); return null; }
      try { film = await atlas.get(path); } catch (error) { film = { cameras: [], error: error.message }; }
      if (film.error) { say(`No film: ${film.error}`); film = null; }
      return gone ? null : film;
    }
    function say(what) { text.textContent = what; text.hidden = false; video.hidden = true; }
    async function choose_(camera) {
      if (!film) return;
      const at = Math.max(0, film.cameras.indexOf(camera));
      const path = `rollouts/${side.rollout}/episode/${side.data.episode}/video/${at}`;
      try {
        if (atlas.live && !urls[at]) {
          // as a whole: a browser jumps about only in what it has
          const answer = await fetch(atlas.url(path));
          if (!answer.ok) throw new Error(`the server answered with ${answer.status}`);
          urls[at] = URL.createObjectURL(await answer.blob());
        }
        if (gone) return;
        video.src = atlas.live ? urls[at] : atlas.url(path, "mp4");
        video.hidden = false;
        text.hidden = true;
        video.onloadeddata = () => to(step);
        video.onerror = () => say("No film: this browser cannot play it (H.264 in mp4).");
      } catch (error) { say(`No film: ${error.message}`); }
    }
    let step = 0;
    // the middle of a frame: rounding must not show the one before
    const seconds = (at) => (Math.min(at, side.data.steps.n) + 0.5) / film.fps;
    function to(now) {
      step = now;
      over.hidden = now <= side.data.steps.n;
      if (film && video.readyState > 0 && Math.abs(video.currentTime - seconds(now)) > 0.2 / film.fps) video.currentTime = seconds(now);
    }
    function follow(now, speed) {
      step = now;
      over.hidden = now <= side.data.steps.n;
      if (!film || !video.readyState) return;
      if (now >= side.data.steps.n) { video.pause(); to(now); return; }
      video.playbackRate = speed;
      if (video.paused) video.play().catch(() => {});
      if (Math.abs(video.currentTime - seconds(now)) > 2.5 / film.fps) video.currentTime = seconds(now);
    }
    function close() { gone = true; video.pause(); video.removeAttribute("src"); urls.forEach((url) => URL.revokeObjectURL(url)); urls = []; }
    return { el, canvas, load, choose: choose_, to, follow, pause: () => video.pause(), close };
  }

  /* where what was moved came to lie: beside which of the places that never move */
  function ends(tracks) {
    const unit = tracks.unit === "m" ? " m" : ` ${tracks.unit}`, fixed = tracks.objects.filter((each) => each.fixed && each.x && each.y);
    return tracks.objects.filter((each) => !each.fixed && each.x && each.y).flatMap((each) => {
      const n = each.x.length - 1, moved = Math.hypot(each.x[n] - each.x[0], each.y[n] - each.y[0]);
      // less is what an arm that touches it in passing does
      if (tracks.unit !== "m" || moved < 0.03) return [];
      const near = fixed.map((place) => [Math.hypot(each.x[n] - place.x[0], each.y[n] - place.y[0]), place.name]).sort((a, b) => a[0] - b[0])[0];
      return [`${each.name} was moved ${number(Number(moved.toFixed(3)))}${unit}${near ? ` and ends ${number(Number(near[0].toFixed(3)))}${unit} from the centre of ${near[1]}` : ""}`];
    });
  }

  /* the numbers at the step: what the plots say, as a table */
  function readings(sides) {
    const body = h("tbody", {}), el = h("details", { class: "ep-readings" }, h("summary", {}, "Numbers at this step"), h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Numbers at this step" },
      h("table", {}, h("caption", {}, "State before the step, and the action taken"), h("thead", {}, h("tr", {}, ["", ...sides.map((side) => side.label), ...(sides.length > 1 ? ["difference"] : [])].map((text, i) =>
        h("th", { scope: "col", class: i ? "number" : null }, text)))), body)));
    let step = 0;
    el.addEventListener("toggle", () => at(step));
    function at(now) {
      step = now;
      if (!el.open) return;
      const row = (name, values) => h("tr", {}, h("th", { scope: "row" }, name), values.map((value) => h("td", { class: "number" }, number(value))),
        sides.length > 1 ? h("td", { class: "number" }, values.every((value) => typeof value === "number") ? number(Number((values[0] - values[1]).toFixed(4))) : "") : null);
      const tracks = sides.map((side) => side.data.steps);
      body.replaceChildren(
        ...tracks[0].state_names.map((name, i) => row(name, tracks.map((each) => each.state[now]?.[i]))),
        ...tracks[0].action_names.map((name, i) => row(`action ${name}`, tracks.map((each) => each.action[now]?.[i]))),
        ...(tracks[0].phase ? [row("phase", tracks.map((each) => each.phase?.[now]))] : []),
        ...tracks[0].objects.filter((each) => !each.fixed).flatMap((object) => ["x", "y", "z"].filter((axis) => object[axis]).map((axis) =>
          row(`${object.name} ${axis}`, tracks.map((each) => each.objects.find((one) => one.name === object.name)?.[axis]?.[now])))));
    }
    return { el, at };
  }

  function plots(sides, n, differs, pick) {
    const tracks = sides.map((side) => side.data.steps), names = sides.map((side) => side.side), parts = [], lower = [];
    const line = (title, values, unit, height) => lines({ title, unit, n, differs, pick, height, series: tracks.map((track, i) => ({ side: names[i], values: values(track) })).reverse() });
    if (tracks.some((track) => track.phase)) {
      parts.push(ribbons({ title: "Phases", n, differs, pick, words: (value) => value || "", order: [...new Set([...tracks[0].phases, ...tracks.flatMap((track) => track.phase || [])])].filter(Boolean),
        rows: sides.map((side) => ({ side: side.side, label: side.label, values: side.data.steps.phase || [] })) }));
    }
    const holds = tracks[0].holds;
    if (holds && tracks.every((track) => track.state.every((state) => state[holds.at] === 0 || state[holds.at] === 1))) {
      parts.push(ribbons({ title: "Gripper", n, differs, pick, order: [1], words: (value) => (value ? holds.name : ""),
        rows: sides.map((side) => ({ side: side.side, label: side.label, values: side.data.steps.state.map((state) => state[holds.at]) })) }));
    } else if (holds) lower.push(line(holds.name, (track) => track.state.map((state) => state[holds.at])));
    const top = tracks.some((track) => track.hand || track.objects.some((each) => each.x && each.y)) ? topView({ sides: sides.map((side) => ({ side: side.side, tracks: side.data.steps })), unit: tracks[0].unit }) : null;
    if (tracks.some((track) => track.hand && track.hand.z)) lower.push(line("Height of the hand", (track) => (track.hand ? track.hand.z : []), tracks[0].unit));
    const moved = tracks[0].objects.filter((each) => !each.fixed && each.z && Math.max(...each.z) - Math.min(...each.z) > 0.01);
    for (const object of moved) lower.push(line(`Height of ${object.name}`, (track) => track.objects.find((each) => each.name === object.name)?.z?.slice() || [], tracks[0].unit, 96));
    if (sides.length > 1 && tracks.every((track) => track.hand)) {
      const values = Array.from({ length: Math.min(tracks[0].n, tracks[1].n) + 1 }, (_, i) => apart(tracks[0], tracks[1], i));
      lower.push(lines({ title: "Distance between the two hands", unit: tracks[0].unit, n, differs, pick, series: [{ side: "both", values }] }));
    }
    if (!tracks[0].hand) tracks[0].state_names.forEach((name, i) => lower.push(line(name, (track) => track.state.map((state) => state[i]), "", 96)));
    const actions = tracks[0].action_names.map((name, i) => line(`Action ${name}`, (track) => track.action.map((action) => action[i]), "", 96));
    return { parts, top, lower, actions, all: [...parts, ...(top ? [top] : []), ...lower, ...actions] };
  }

  /* what differs, in a sentence */
  function verdict(own, other, differs) {
    const a = own.data.steps, b = other.data.steps;
    if (differs === null) return "Both took the same actions throughout.";
    const distances = Array.from({ length: Math.min(a.n, b.n) + 1 }, (_, i) => apart(a, b, i)).filter((value) => value != null);
    const far = distances.length ? `, and get up to ${number(Math.max(...distances))} ${a.unit} apart` : "";
    const same = a.state[0].every((value, i) => value === b.state[0][i]) ? "Both start alike" : "They start from different states";
    return `${same}; their actions differ from step ${differs} on${far}. ${a.n} steps against ${b.n}.`;
  }

  async function show(el, rollout, number_, params, fresh) {
    const path = (episode) => `rollouts/${rollout}/episode/${episode}`;
    const data = await atlas.get(path(number_));
    const found = opponent(data, params.against);
    const wanted = found && atlas.has(path(found.episode)) ? found : null;
    const beside = wanted ? await atlas.get(path(wanted.episode)).catch((error) => ({ missing: error.message })) : null;
    if (!fresh()) return { hide() {}, keys: () => false };
    const sides = [{ side: "own", label: data.arm, rollout, data }, ...(beside && !beside.missing ? [{ side: "other", label: beside.arm, rollout, data: beside }] : [])];
    const n = Math.max(...sides.map((side) => side.data.steps.n)), differs = sides.length > 1 ? firstDifference(data.steps, beside.steps) : null;
    const state = { step: Math.min(n, Math.max(0, Number(params.step) || 0)), speed: SPEEDS.some(([key]) => key === params.speed) ? params.speed : "1", camera: params.camera || "", playing: false };
    const address = { ...params, against: params.against || "" };
    let saved = 0;
    const save = () => { clearTimeout(saved); saved = setTimeout(() => atlas.replace([rollout, number_], { ...address, step: state.step || "", camera: state.camera, speed: state.speed === "1" ? "" : state.speed }), 150); };

    sides.forEach((side) => { side.screen = screen(side); });
    const plotted = plots(sides, n, differs, (to) => { stop(); go(to); });
    const numbers = readings(sides);
    const slider = h("input", { type: "range", min: 0, max: n, step: 1, value: state.step, id: "ep-step", "aria-label": "Step", class: "ep-slider", on: { input: () => { stop(); go(Number(slider.value)); } } });
    const where = h("output", { for: "ep-step", class: "ep-where" });
    const button = (text, label, run) => h("button", { type: "button", "aria-label": label, title: label, on: { click: run } }, text);
    const play = button("Play", "Play or pause (space)", () => (state.playing ? stop() : start()));
    const maps = attention({ camera: () => state.camera, params, changed: (more) => { Object.assign(address, { site: more.site, head: more.head, asks: more.asks, denoise: more.denoise }); save(); },
      sides: sides.map((side) => ({ side: side.side, label: side.label, rollout, episode: side.data.episode, canvas: side.screen.canvas, n: side.data.steps.n, last: side.data.steps.n - 1,
        n_action_steps: chunkSize(side.data.steps) })) });
    const toggle = h("input", { type: "checkbox", id: "ep-attention", on: { change: () => { address.attention = toggle.checked ? "1" : ""; stop(); maps.show(toggle.checked); save(); } } });
    const cameras = h("span", {});

    function go(to) {
      state.step = Math.min(n, Math.max(0, to));
      slider.value = state.step;
      where.textContent = `step ${state.step} of ${n}${state.step === n ? ", the end" : ""}`;
      plotted.all.forEach((each) => each.at(state.step));
      numbers.at(state.step);
      if (!state.playing) { sides.forEach((side) => side.screen.to(state.step)); maps.step(state.step); save(); }
    }
    let frame = 0, began = 0, from = 0;
    function start() {
      if (state.step >= n) go(0);
      Object.assign(state, { playing: true });
      maps.playing(true);
      play.textContent = "Pause";
      began = performance.now();
      from = state.step;
      const fps = data.fps || 20;
      const tick = (now) => {
        const to = Math.min(n, from + Math.floor(((now - began) / 1000) * fps * Number(state.speed)));
        if (to !== state.step) go(to);
        sides.forEach((side) => side.screen.follow(state.step, Number(state.speed)));
        if (to >= n) stop();
        else frame = requestAnimationFrame(tick);
      };
      frame = requestAnimationFrame(tick);
    }
    function stop() {
      if (!state.playing) return;
      state.playing = false;
      cancelAnimationFrame(frame);
      play.textContent = "Play";
      sides.forEach((side) => side.screen.pause());
      go(state.step);
    }
    const beneath = (side) => h("div", { class: "ep-about" }, h("p", {}, h("span", { class: `ep-side side-${side.side}` }, side.label), " ", outcome(side.data), h("span", { class: "soft" }, ` episode ${side.data.episode}, ${side.data.n_steps} steps`)),
      h("p", { class: "soft" }, side.data.arm_text), ends(side.data.steps).map((text) => h("p", {}, `${text}.`)),
      side.data.told.map((told) => h("p", {}, `Told${told.start ? ` from step ${told.start}` : ""}: `, h("q", {}, told.text == null ? side.data.instruction : told.text))));
    const none = !found ? "No other arm ran from this start." : !wanted ? "This copy of the page does not hold the episode beside it." : beside.missing;
    const arms = data.cell.filter((each) => each.episode !== data.episode).map((each) => [each.arm, `${each.arm} (${each.success ? "success" : "failure"})`]);
    const step = (by) => () => { stop(); go(state.step + by); };
    el.replaceChildren(h("div", {},
      h("nav", { "aria-label": "Where this is" }, h("a", { href: atlas.link("episodes", [rollout]) }, data.path), h("span", { class: "soft" }, ` / episode ${data.episode}`)),
      h("h1", {}, `${data.instruction}`),
      h("p", { class: "soft" }, `Task ${data.task}, seed ${data.seed}. `, differs !== undefined && sides.length > 1 ? verdict(sides[0], sides[1], differs) : none, " ", source(data.file)),
      h("div", { class: "fields" },
        arms.length ? choose({ label: "Beside it", value: wanted ? wanted.arm : "none", options: [...arms, ["none", "nothing"]], change: (arm) => atlas.go("episodes", [rollout, number_], { ...address, against: arm, step: state.step || "", camera: state.camera }) }) : null,
        data.cell.length > 1 ? choose({ label: "This arm", value: data.arm, options: data.cell.map((each) => [each.arm, `${each.arm} (${each.success ? "success" : "failure"})`]),
          change: (arm) => atlas.go("episodes", [rollout, data.cell.find((each) => each.arm === arm).episode], { ...address, step: state.step || "", camera: state.camera }) }) : null,
        cameras, h("span", { class: "field ep-check" }, toggle, h("label", { for: "ep-attention" }, "Attention"))),
      maps.el,
      h("div", { class: `ep-screens ep-screens-${sides.length}` }, sides.map((side) => h("section", { class: "ep-column", "aria-label": side.label }, side.screen.el, beneath(side))), plotted.top && plotted.top.el),
      h("div", { class: "ep-bar", role: "group", "aria-label": "Scrubber" }, button("|◀", "First step (Home)", () => { stop(); go(0); }), button("◀", "One step back (←)", step(-1)), play, button("▶", "One step on (→)", step(1)),
        differs ? button("≠", `Where the actions begin to differ: step ${differs} (d)`, () => { stop(); go(differs); }) : null,
        slider, where, choose({ label: "Speed", value: state.speed, options: SPEEDS, change: (speed) => { const on = state.playing; stop(); state.speed = speed; save(); if (on) start(); } })),
      plotted.parts.map((each) => each.el),
      h("div", { class: "ep-grid-of-plots" }, plotted.lower.map((each) => each.el)),
      h("h2", {}, "Actions"), h("div", { class: "ep-grid-of-plots" }, plotted.actions.map((each) => each.el)), numbers.el));
    go(state.step);
    films();
    async function films() {
      const made = await Promise.all(sides.map((side) => side.screen.load()));
      const known = [...new Set(made.flatMap((film) => (film ? film.cameras : [])))];
      if (!known.length) return;
      if (!known.includes(state.camera)) state.camera = known[0];
      const all = (camera) => { state.camera = camera; sides.forEach((side) => side.screen.choose(camera)); maps.paint(); };
      if (known.length > 1) cameras.replaceChildren(choose({ label: "Camera", value: state.camera, options: known, change: (camera) => { all(camera); save(); } }));
      all(state.camera);
      if (params.attention === "1") { toggle.checked = true; maps.show(true); }
    }
    const nearby = (by) => { const at = data.cell.findIndex((each) => each.episode === data.episode) + by; return data.cell[at]; };
    const keys = (event) => {
      const run = { ArrowRight: step(1), ArrowLeft: step(-1), Home: () => { stop(); go(0); }, End: () => { stop(); go(n); }, " ": () => (state.playing ? stop() : start()), d: () => differs != null && (stop(), go(differs)),
        ArrowDown: nearby(1) && (() => atlas.go("episodes", [rollout, nearby(1).episode], { ...address, step: state.step || "", camera: state.camera })),
        ArrowUp: nearby(-1) && (() => atlas.go("episodes", [rollout, nearby(-1).episode], { ...address, step: state.step || "", camera: state.camera })),
        Escape: () => atlas.go("episodes", [rollout]) }[event.key];
      if (!run || (event.key === " " && event.target.closest("button, summary, a"))) return false;
      run();
      return true;
    };
    return { keys, hide() { stop(); clearTimeout(saved); maps.show(false); sides.forEach((side) => side.screen.close()); } };
  }
  const chunkSize = (steps) => Math.max(1, ...steps.chunk_step.map((at) => at + 1));
  Object.assign(window.atlasEpisodes, { show, outcome });
})();
