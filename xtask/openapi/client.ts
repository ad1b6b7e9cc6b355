// What a program in TypeScript does with the generated types. It is compiled and not run: a renamed operation, field or
// status is an error here.
import type { components, operations } from "./types";

type Body<Operation extends { requestBody?: { content: { "application/json": unknown } } }> =
  NonNullable<Operation["requestBody"]>["content"]["application/json"];

const create: Body<operations["createKey"]> = { email: "user@example.com", name: "Production Key" };
const change: Body<operations["updateKey"]> = { disabled: true };
const find: operations["listKeys"]["parameters"]["query"] = { email: "user@example.com", limit: 10 };
const name: operations["revokeKey"]["parameters"]["path"] = { id: "0199f0a6-3b7c-7d52-9a3e-4f6d1c2b8e90" };

export function secret(reply: operations["createKey"]["responses"]["201"]): string {
  const etag: string | undefined = reply.headers.etag;
  return `${reply.content["application/json"].secret} ${etag}`;
}

export function waits(reply: operations["getUserUsage"]["responses"]["429"]): [number | undefined, string] {
  const problem: components["schemas"]["Problem"] = reply.content["application/problem+json"];
  return [reply.headers["retry-after"], problem.code];
}

export const calls = { create, change, find, name };
