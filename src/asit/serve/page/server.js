// Questions to the server, and its refusals in words.

function sentence(words) {
  return words ? `${words[0].toUpperCase()}${words.slice(1)}.` : "";
}

export class Refusal extends Error {
  constructor(words, status = 0) { // 0: no answer
    super(words.found);
    this.status = status;
    this.passing = status === 0 || status === 408 || status >= 500;
    this.remedy = [words.expected && `Expected: ${words.expected}.`, sentence(words.remedy)].filter(Boolean).join(" ");
  }
}

export async function ask(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal({ found: "The server does not answer.", remedy: "see whether asit serve still runs" });
  }
  if (answer.ok) return answer;
  let words;
  try {
    words = await answer.json();
  } catch {
    words = { found: `The server answered ${answer.status} ${answer.statusText}.` };
  }
  throw new Refusal(words, answer.status);
}

// A folder is not, nor is a file that was moved since it was chosen.
export async function readable(some) {
  try {
    await some.slice(0, 1).arrayBuffer();
    return true;
  } catch {
    return false;
  }
}
