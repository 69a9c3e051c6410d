"""What a reader without a mouse, or with weak sight, would miss on a page. Basics, computed in the page itself."""

from playwright.sync_api import Page

CONTRAST = 4.5

# names of controls, texts for pictures, captions, ids, and the contrast of every text that is shown
_PROBLEMS = """
(least) => {
  const found = [];
  const say = (what, node) => found.push(`${what}: ${node.outerHTML.slice(0, 160)}`);
  const seen = (node) => node.checkVisibility({ visibilityProperty: true }) && node.getClientRects().length > 0;
  const named = (node) => (node.getAttribute("aria-label") || "").trim() || (node.labels && node.labels.length
    && [...node.labels].some((label) => label.textContent.trim())) || document.getElementById(
    node.getAttribute("aria-labelledby") || "-") || (["INPUT", "SELECT", "TEXTAREA"].includes(node.tagName) ? ""
    : node.textContent.trim()) || node.querySelector("img[alt]");
  const controls = "a[href], button, input, select, textarea, summary, [tabindex='0'], [role]";
  for (const node of document.querySelectorAll(controls)) {
    if (seen(node) && !named(node) && node.id !== "status") say("no name", node);
  }
  for (const node of document.querySelectorAll("img, video, canvas")) {
    const described = node.tagName === "IMG" ? node.hasAttribute("alt") : node.getAttribute("aria-label")
      || node.closest("[aria-label][role=img], [aria-hidden=true]");
    if (seen(node) && !described) say("no description", node);
  }
  for (const node of document.querySelectorAll("main table")) if (!node.caption) say("no caption", node);
  const ids = [...document.querySelectorAll("[id]")].map((node) => node.id);
  for (const id of new Set(ids)) if (ids.filter((each) => each === id).length > 1) found.push(`id twice: ${id}`);
  if (!document.documentElement.lang) found.push("no language");
  if (document.querySelectorAll("h1").length > 1) found.push("several h1");

  const parse = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return [...n.slice(0, 3), n[3] ?? 1]; };
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const light = (c) => { const [r, g, b] = c.slice(0, 3).map((x) => x / 255)
    .map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = (node) => {
    const layers = [];
    for (let at = node; at; at = at.parentElement) {
      if (at instanceof SVGElement) {
        const rect = at.tagName === "text" && [...at.parentElement.children].find((each) => each.tagName === "rect");
        if (rect) layers.push(parse(getComputedStyle(rect).fill));
      } else layers.push(parse(getComputedStyle(at).backgroundColor));
      if (layers.length && layers[layers.length - 1][3] === 1) break;
    }
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255, 1]);
  };
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((each) => each.nodeType === 3 && each.textContent.trim());
    if (!own || !seen(node) || node.closest("[disabled], [aria-hidden=true], .skip, noscript")) continue;
    const style = getComputedStyle(node), back = behind(node);
    const front = over(parse(node instanceof SVGElement ? style.fill : style.color), back);
    const [a, b] = [light(front), light(back)].sort((x, y) => y - x), ratio = (a + 0.05) / (b + 0.05);
    if (ratio < least) say(`contrast ${ratio.toFixed(2)}`, node);
  }
  return found;
}
"""

_FOCUS = """
() => {
  const node = document.activeElement;
  if (!node || node === document.body) return null;
  const style = getComputedStyle(node), rect = node.querySelector && node.querySelector("rect, text");
  const drawn = rect && node instanceof SVGElement && (parseFloat(getComputedStyle(rect).strokeWidth) >= 3
    || getComputedStyle(rect).textDecorationLine === "underline");
  const shown = (style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2) || drawn;
  return [shown, node.outerHTML.slice(0, 160)];
}
"""


def problems(page: Page) -> list[str]:
    """Controls without a name, pictures without a text, tables without a caption, text of too little contrast, and a
    page that scrolls sideways."""
    found = page.evaluate(_PROBLEMS, CONTRAST)
    wide = page.evaluate("() => document.documentElement.scrollWidth - document.documentElement.clientWidth")
    return [*found, *([f"{wide} pixels too wide"] if wide > 0 else [])]


def hidden_focus(page: Page, steps: int = 30) -> list[str]:
    """Elements that the tab key reaches without showing it, of the first `steps`; at least one is reached."""
    reached, found = 0, []
    for _ in range(steps):
        page.keyboard.press("Tab")
        now = page.evaluate(_FOCUS)
        if now is None:
            break
        reached += 1
        if not now[0]:
            found.append(now[1])
    assert reached
    return found
