// The kernel behind a live view: it answers questions, and hands over parts of the module that are wanted later.

let asked = 0; // by all views of a model, which hear all of its answers

export class Kernel {
  /** @param {any} model */
  constructor(model) {
    this.model = model;
    /** @type {Map<number, {resolve: (answer: any) => void, reject: (error: Error) => void}>} */
    this.waiting = new Map();
    /** @type {(content: any, buffers: DataView[]) => void} */
    this.heard = (content, buffers) => {
      const waiting = this.waiting.get(content.number);
      if (!waiting) return;
      this.waiting.delete(content.number);
      if (content.error) waiting.reject(new Error(content.error));
      else waiting.resolve({ ...content, buffers });
    };
    model.on("msg:custom", this.heard);
  }

  /** The answer, which has `buffers`; rejects with the kernel's words. */
  ask(question) {
    const number = ++asked;
    return new Promise((resolve, reject) => {
      this.waiting.set(number, { resolve, reject });
      try {
        this.model.send({ ...question, number });
      } catch {
        this.waiting.delete(number);
        reject(new Error("The kernel of this view is gone. Run its cell again."));
      }
    });
  }

  close() {
    this.model.off("msg:custom", this.heard);
    for (const { reject } of this.waiting.values()) reject(new Error("the view was closed"));
    this.waiting.clear();
  }
}

/**
 * What an import that is awaited is in a widget: the kernel hands the file over, once.
 * @param {any} model
 * @param {Record<string, any>} modules by name, to which it adds
 */
export function laterFrom(model, modules) {
  /** @type {Map<string, Promise<any>>} */
  const wanted = new Map();
  return (/** @type {string} */ name) => {
    const found = wanted.get(name) ?? handedOver(model, modules, name);
    wanted.set(name, found);
    found.catch(() => wanted.delete(name)); // whoever wants it next asks again
    return found;
  };
}

async function handedOver(model, modules, name) {
  const kernel = new Kernel(model);
  try {
    const { buffers } = await kernel.ask({ ask: "module", name });
    const address = URL.createObjectURL(new Blob(buffers, { type: "text/javascript" }));
    try {
      (await import(address)).default(modules);
    } finally {
      URL.revokeObjectURL(address);
    }
    return modules[name];
  } finally {
    kernel.close();
  }
}
