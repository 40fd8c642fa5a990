import assert from "node:assert/strict";
import { test } from "node:test";
import { colourAt, css, divergingAt, gradient, inkOn } from "workbench/shared/colour.js";

const light = (rgb) => rgb.map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4)).reduce((sum, c, i) => sum + [0.2126, 0.7152, 0.0722][i] * c, 0);

test("the sequential scale leaves the paper steadily, is close to it at 0, and stops at its ends", () => {
  for (const [theme, paper] of [["light", 255], ["dark", 23]]) {
    assert.ok(colourAt(0, theme).every((c) => Math.abs(c - paper) <= 18), `${colourAt(0, theme)}`);
    assert.deepEqual(colourAt(-5, theme), colourAt(0, theme));
    assert.deepEqual(colourAt(7, theme), colourAt(1, theme));
    const steps = Array.from({ length: 21 }, (_, i) => light(colourAt(i / 20, theme)));
    const away = theme === "light" ? -1 : 1;
    assert.ok(steps.every((step, i) => i === 0 || away * step > away * steps[i - 1]), theme);
  }
});

test("the diverging scale has the theme's background in its middle", () => {
  for (const [theme, middle] of [["light", 244], ["dark", 38]]) {
    assert.ok(divergingAt(0, theme).every((c) => Math.abs(c - middle) <= 6), `${divergingAt(0, theme)}`);
    assert.notDeepEqual(divergingAt(-1, theme), divergingAt(1, theme));
    assert.deepEqual(divergingAt(-9, theme), divergingAt(-1, theme));
  }
});

test("ink is readable on every colour of both scales", () => {
  for (let i = 0; i <= 100; i++) {
    for (const rgb of [colourAt(i / 100, "light"), colourAt(i / 100, "dark"), divergingAt(i / 50 - 1, "light"), divergingAt(i / 50 - 1, "dark")]) {
      const ink = inkOn(rgb) === "#fff" ? 1 : 0;
      const [high, low] = [Math.max(light(rgb), ink), Math.min(light(rgb), ink)];
      assert.ok((high + 0.05) / (low + 0.05) >= 4.5, css(rgb));
    }
  }
});

test("a gradient runs from one end to the other", () => {
  assert.match(gradient(colourAt), /^linear-gradient\(to right, rgb\(247 247 244\), .*, rgb\(26 10 46\)\)$/);
  assert.match(gradient(colourAt, "dark"), /^linear-gradient\(to right, rgb\(28 32 41\), .*, rgb\(253 231 37\)\)$/);
});
