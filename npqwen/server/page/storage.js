// What the browser keeps: conversations in IndexedDB, settings and the API key in localStorage. Servers below different
// paths of one host are kept apart.

const NAME = `npqwen ${new URL(".", document.baseURI).pathname}`;
const STORE = "conversations";

// A value of localStorage, or the fallback if there is none or storage is switched off.
export function remembered(name, fallback) {
  try {
    return JSON.parse(localStorage.getItem(`${NAME} ${name}`)) ?? fallback;
  } catch {
    return fallback;
  }
}

export function remember(name, value) {
  try {
    localStorage.setItem(`${NAME} ${name}`, JSON.stringify(value));
  } catch {
    // switched off or full: it holds until the page is closed
  }
}

// Does work() when no other tab does anything of this name. Browsers know locks only on localhost and with HTTPS.
export function alone(name, work) {
  return navigator.locks ? navigator.locks.request(`${NAME} ${name}`, work) : work();
}

// All conversations of this browser, and of other tabs as they change.
export class Storage {
  // onchange(id): another tab has changed or deleted the conversation.
  constructor(onchange) {
    this.channel = new BroadcastChannel(NAME);
    this.channel.onmessage = ({ data }) => onchange(data);
    this.timers = new Map();
  }

  async open() {
    const opening = indexedDB.open(NAME, 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore(STORE, { keyPath: "id" });
    this.database = await finished(opening);
  }

  all() {
    return finished(this.store("readonly").getAll());
  }

  get(id) {
    return finished(this.store("readonly").get(id));
  }

  async put(conversation) {
    clearTimeout(this.timers.get(conversation.id));
    this.timers.delete(conversation.id);
    if (!this.database) return;
    await this.write((store) => store.put(conversation));
    this.channel.postMessage(conversation.id);
  }

  // Saves soon, and at most a few times a second: for answers that come.
  putSoon(conversation) {
    if (this.timers.has(conversation.id)) return;
    this.timers.set(conversation.id, setTimeout(() => this.put(conversation).catch(() => {}), 300));
  }

  async delete(id) {
    clearTimeout(this.timers.get(id));
    this.timers.delete(id);
    if (!this.database) return;
    await this.write((store) => store.delete(id));
    this.channel.postMessage(id);
  }

  write(change) {
    const store = this.store("readwrite");
    const done = finished(change(store));
    store.transaction.commit(); // at once: the page may be about to close
    return done;
  }

  store(mode) {
    return this.database.transaction(STORE, mode).objectStore(STORE);
  }
}

function finished(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}
