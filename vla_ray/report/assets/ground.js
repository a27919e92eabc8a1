// The ground seen from above, with a grid and the one who drives or walks: x forward is up, one scale for both axes.
"use strict";

const Ground = (() => {
  const { makeSvg, number } = Shared;

  const [LEFT, RIGHT, TOP, BOTTOM] = [40, 12, 10, 34]; // room for the labels, pixels
  const STEPS = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100]; // of the grid
  const tick = (value) => (Number.isInteger(value) ? number(value) : value.toFixed(1).replace("-", "\u2212"));

  // An empty drawing that fills the element, or null if that is too small to draw in.
  //   back, front: least and greatest x that is seen; side: greatest |y|; leftward: y counts to the left, else to the right.
  //   Returns { svg, at: (x, y) => [u, v] in pixels, middle, top, left }.
  function ground(host, { back, front, side, unit, leftward = false, finest = 1, label }) {
    const [width, height] = [host.clientWidth, host.clientHeight];
    if (width < 60 || height < 60) return null;
    const scale = Math.min((height - TOP - BOTTOM) / (front - back), (width - LEFT - RIGHT) / (2 * side));
    const middle = LEFT + (width - LEFT - RIGHT) / 2;
    const sign = leftward ? -1 : 1;
    const v = (x) => height - BOTTOM - (x - back) * scale;
    const u = (y) => middle + sign * y * scale;
    const svg = makeSvg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": label });
    const step = STEPS.find((size) => size >= finest && size * scale >= 30) ?? 200;
    const line = (m, ends) => svg.append(makeSvg("line", { class: m ? "grid" : "axis", ...ends }));
    const last = (height - TOP - BOTTOM) / scale + back;
    for (let i = Math.ceil(back / step); i * step <= last; i++) {
      line(i, { x1: LEFT, x2: width - RIGHT, y1: v(i * step), y2: v(i * step) });
      svg.append(makeSvg("text", { x: LEFT - 6, y: v(i * step) + 4, "text-anchor": "end" }, tick(i * step)));
    }
    const half = Math.floor((width - LEFT - RIGHT) / 2 / scale / step);
    for (let i = -half; i <= half; i++) {
      line(i, { x1: u(i * step), x2: u(i * step), y1: TOP, y2: height - BOTTOM });
      svg.append(makeSvg("text", { x: u(i * step), y: height - BOTTOM + 15, "text-anchor": "middle" }, tick(i * step)));
    }
    const sideName = leftward ? { x: LEFT, "text-anchor": "start" } : { x: width - RIGHT, "text-anchor": "end" };
    svg.append(makeSvg("text", { class: "axis-name", y: height - 3, ...sideName }, `${leftward ? "left" : "right"} (${unit})`));
    svg.append(makeSvg("text", { class: "axis-name", transform: `translate(10 ${TOP}) rotate(-90)`, "text-anchor": "end" }, `forward (${unit})`));
    return { svg, at: (x, y) => [u(y), v(x)], middle, top: TOP, left: LEFT };
  }

  // An arrow at the start, pointing forward.
  function ego({ svg, at }) {
    const [u, v] = at(0, 0);
    svg.append(makeSvg("path", { class: "ego", d: `M${u} ${v - 9}L${u + 7} ${v + 8}L${u} ${v + 4}L${u - 7} ${v + 8}Z` }));
  }

  return { ground, ego };
})();
