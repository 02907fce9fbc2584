// Sphinx' search asks for a score; answers to questions come first, references last
var Scorer = {
  objNameMatch: 11, objPartialMatch: 6, objPrio: { 0: 15, 1: 5, 2: -5 }, objPrioDefault: 0,
  title: 15, partialTitle: 7, term: 5, partialTerm: 2,
  score: ([name, , , , score]) => {
    const first = /^nbs\/(questions\/|start$)/.test(name);
    return score + (first ? 40 : /^(api|groups|nbs\/tools)\//.test(name) ? -20 : 0);
  },
};
// a page that is opened as a file may not fetch others: their texts are in TEXTS (texts.js)
window.fetch = async url => ({ text: async () => TEXTS[url.replace(/^\.\/|\.html$/g, '')] });
Search.htmlToText = text => text;
