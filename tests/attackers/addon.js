// Loads what addon.c compiles to, which lies beside it. It is no real addon, and Node says so after.
try {
  process.dlopen({ exports: {} }, `${__dirname}/addon.node`);
} catch {}
