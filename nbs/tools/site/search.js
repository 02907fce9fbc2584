// Sphinx' search asks for a score; answers to questions come first, references last
var Scorer = {
  objNameMatch: 11, objPartialMatch: 6, objPrio: { 0: 15, 1: 5, 2: -5 }, objPrioDefault: 0,
  title: 15, partialTitle: 7, term: 5, partialTerm: 2,
  score: ([name, , , , score]) => {
    const ranks = [[/^nbs\/questions\//, 60], [/^nbs\/start$/, 20], [/^(api|groups|nbs\/tools)\//, -20]];
    return ranks.reduce((sum, [pages, rank]) => sum + (pages.test(name) ? rank : 0), score);
  },
};
// a page that is opened as a file may not fetch others: their texts are in TEXTS (texts.js)
window.fetch = async url => ({ text: async () => TEXTS[url.replace(/^\.\/|\.html$/g, '')] });
Search.htmlToText = text => text;
