// The list of conversations can be hidden; on narrow screens it lies over the conversation when it is shown.

const narrow = matchMedia("(max-width: 48rem)");

export class Menu {
  // button: shows and hides the list. shade: covers the rest of a narrow screen; a click on it hides the list.
  constructor(button, shade) {
    this.button = button;
    button.addEventListener("click", () => {
      document.body.classList.toggle(narrow.matches ? "with-sidebar" : "without-sidebar");
      this.tell();
    });
    shade.addEventListener("click", () => this.close());
    narrow.addEventListener("change", () => this.tell());
    this.tell();
  }

  // Whether the list lies over the conversation.
  get covers() {
    return document.body.classList.contains("with-sidebar");
  }

  // Hides the list if it lies over the conversation.
  close() {
    document.body.classList.remove("with-sidebar");
    this.tell();
  }

  tell() {
    const hidden = document.body.classList.contains("without-sidebar");
    this.button.setAttribute("aria-expanded", narrow.matches ? this.covers : !hidden);
  }
}
