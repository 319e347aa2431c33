// Browser storage: conversations in IndexedDB, settings and the API key in localStorage. Servers below different paths
// of one host have separate storage.

const NAME = `npqwen ${new URL(".", document.baseURI).pathname}`;
const STORE = "conversations";

// A value of localStorage, or the fallback if there is none or storage is disabled.
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
    // disabled or full: the value lasts until the page is closed
  }
}

// Saves an answer in progress while the page is being closed, at once: Safari and, now and then, Chromium lose
// transactions of the database that begin as late as that.
export function rememberLast(conversation, message) {
  remember("last", { ...remembered("last", {}), [message.id]: { conversation: conversation.id, message } });
}

// Returns what rememberLast has saved, as [{conversation, message}] with the conversation's id, and forgets it.
export function takeLast() {
  const last = Object.values(remembered("last", {}));
  remember("last", {});
  return last;
}

// Whether tabs can lock names. Browsers allow it only on localhost and with HTTPS.
export const HAS_LOCKS = "locks" in navigator;

// Runs work() while holding the lock of this name, shared by all tabs; calls held() first if another tab holds it.
// Without locks, work() runs at once.
export async function alone(name, work, held = () => {}) {
  if (!HAS_LOCKS) return work();
  const lockName = `${NAME} ${name}`;
  try {
    const worked = await navigator.locks.request(lockName, { ifAvailable: true }, async (lock) => {
      if (lock) await work();
      return lock !== null;
    });
    if (worked) return;
    held();
    await navigator.locks.request(lockName, work);
  } catch (error) {
    if (error.name !== "AbortError") throw error; // Safari takes the lock away when it closes the page
  }
}

// All conversations of this browser, with notifications of changes by other tabs. Saving waits until the database is
// open; if the browser allows none, all() and get() throw, and nothing is saved.
export class Storage {
  // onchange(id): another tab has changed or deleted the conversation.
  constructor(onchange) {
    this.channel = new BroadcastChannel(NAME);
    this.channel.onmessage = ({ data }) => onchange(data);
    this.timers = new Map();
    this.opening = openDatabase();
    this.opening.catch(() => {});
  }

  async all() {
    const database = await this.opening;
    return finished(database.transaction(STORE).objectStore(STORE).getAll());
  }

  async get(id) {
    const database = await this.opening;
    return finished(database.transaction(STORE).objectStore(STORE).get(id));
  }

  // Returns when the conversation is saved.
  async put(conversation) {
    this.forgetTimer(conversation.id);
    await this.write(conversation.id, (store) => store.put(conversation));
  }

  // Saves soon, and at most a few times a second: for answers in progress.
  putSoon(conversation) {
    if (this.timers.has(conversation.id)) return;
    this.timers.set(conversation.id, setTimeout(() => this.put(conversation).catch(() => {}), 300));
  }

  async delete(id) {
    this.forget(id);
    await this.write(id, (store) => store.delete(id));
  }

  // Saves nothing more of a conversation that is deleted.
  forget(id) {
    this.forgetTimer(id);
    const others = Object.entries(remembered("last", {})).filter(([, last]) => last.conversation !== id);
    remember("last", Object.fromEntries(others));
  }

  forgetTimer(id) {
    clearTimeout(this.timers.get(id));
    this.timers.delete(id);
  }

  async write(id, change) {
    const database = await this.opening.catch(() => null);
    if (!database) return;
    const transaction = database.transaction(STORE, "readwrite");
    change(transaction.objectStore(STORE));
    transaction.commit(); // at once: the page may be about to close
    await new Promise((resolve, reject) => {
      transaction.oncomplete = resolve;
      transaction.onabort = () => reject(transaction.error);
    });
    this.channel.postMessage(id);
  }
}

// Rejects if the browser allows no database: in some, opening fails with an event, in others with an exception.
async function openDatabase() {
  const opening = indexedDB.open(NAME, 1);
  opening.onupgradeneeded = () => opening.result.createObjectStore(STORE, { keyPath: "id" });
  return finished(opening);
}

function finished(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}
