// Requests that the server was too busy for, and that are sent again after the time that it named.

const MOST = 5; // for one answer

export class Retries {
  // ontick: called every second during a wait, and at its end.
  constructor(ontick) {
    this.ontick = ontick;
    this.waits = new Map(); // {left, timer} by the message's id
  }

  // Calls again(attempt + 1) after some seconds, unless `forget` is called before, or there were too many attempts.
  start(id, seconds, attempt, again) {
    if (attempt >= MOST) return;
    const wait = { left: seconds };
    wait.timer = setInterval(() => {
      wait.left--;
      if (wait.left <= 0) {
        this.forget(id);
        again(attempt + 1);
      }
      this.ontick();
    }, 1000);
    this.waits.set(id, wait);
  }

  forget(id) {
    clearInterval(this.waits.get(id)?.timer);
    this.waits.delete(id);
  }

  // The seconds left until a message's request is sent again; null if it is not.
  left(id) {
    return this.waits.get(id)?.left ?? null;
  }
}
