// Unpacks the browser that lies compressed in @sparticuz/chromium, and the libraries it wants beside it. No root, no
// system packages.

import { execFileSync } from "node:child_process"
import { existsSync, mkdirSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs"
import { join } from "node:path"
import { brotliDecompressSync } from "node:zlib"

const modules = join(import.meta.dirname, "node_modules")
const packed = (name) => brotliDecompressSync(readFileSync(join(modules, "@sparticuz/chromium/bin", name)))
const folder = join(modules, ".chromium")

// Whole or not at all: what is unpacked is used by whoever finds it.
if (process.platform === "linux" && process.arch === "x64" && !existsSync(folder)) {
  const temporary = `${folder}-${process.pid}`
  mkdirSync(temporary)
  writeFileSync(join(temporary, "chromium"), packed("chromium.br"), { mode: 0o755 })
  execFileSync("tar", ["-x", "-C", temporary], { input: packed("al2023.tar.br") })
  try {
    renameSync(temporary, folder)
  } catch {
    rmSync(temporary, { recursive: true }) // another one was faster
  }
}
