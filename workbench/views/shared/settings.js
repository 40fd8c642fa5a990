// What one sets in a view by selects and check boxes: kept in the view's state, which Python, pages and pictures have.

import { checkbox, selector } from "./dom.js";

export class Settings {
  /** @param {import("./frame.js").Frame} frame */
  constructor(frame) {
    this.frame = frame;
  }

  /**
   * A select whose choice is the state `name`; `told` hears of every new choice, wherever it was made.
   * @param {string} name
   * @param {string} label
   * @param {(string | number)[][]} options values, as the state has them, and their texts
   * @param {string | number} first what is chosen while the state says nothing, or nothing that is offered
   * @param {(value: any) => void} told
   */
  pick(name, label, options, first, told) {
    const { select, field } = selector(label, options, () => this.frame.keep({ [name]: options[select.selectedIndex][0] }));
    const valid = (value) => options.some(([offered]) => offered === value);
    const value = this.follow(name, valid, first, told, (now) => {
      select.selectedIndex = options.findIndex(([offered]) => offered === now);
    });
    return { select, field, value };
  }

  /**
   * A check box whose mark is the state `name`.
   * @param {string} name
   * @param {string} label
   * @param {boolean} first
   * @param {(on: boolean) => void} told
   */
  mark(name, label, first, told) {
    const { box, text, field } = checkbox(label, first, (on) => this.frame.keep({ [name]: on }));
    const value = this.follow(name, (on) => typeof on === "boolean", first, told, (on) => {
      box.checked = on;
    });
    return { box, text, field, value };
  }

  /** Read a state now and whenever it changes: `show` what it is, and tell of what is new. */
  follow(name, valid, first, told, show) {
    const read = () => (valid(this.frame.state[name]) ? this.frame.state[name] : first);
    let now = read();
    show(now);
    this.frame.onState(() => {
      const value = read();
      show(value);
      if (JSON.stringify(value) === JSON.stringify(now)) return;
      now = value;
      told(value);
    });
    return now;
  }
}
