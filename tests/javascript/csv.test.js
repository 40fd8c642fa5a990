import assert from "node:assert/strict";
import { test } from "node:test";
import { csvOf } from "workbench/shared/csv.js";

test("texts are quoted, formulas are not, and unknown numbers are empty", () => {
  const rows = [["token", "weight"], ["a,b", 0.5], ['say "x"', NaN], ["line\nend", -1], ["=1+1", 0], ["-2", 1e-9], ["", Infinity]];
  assert.equal(csvOf(rows), 'token,weight\r\n"a,b",0.5\r\n"say ""x""",\r\n"line\nend",-1\r\n\'=1+1,0\r\n\'-2,1e-9\r\n,Infinity\r\n');
  assert.equal(csvOf([]), "");
});
