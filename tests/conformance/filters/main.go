// SPDX-License-Identifier: Apache-2.0

// Command filters answers, for each line of JSON on standard input, what containerd's own filter
// package makes of it: {"filters": [...], "fields": {"labels.a": "1"}} -> true, false or null
// (null: a filter is not in the language).
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/containerd/containerd/filters"
	"github.com/sirupsen/logrus"
)

func main() {
	logrus.SetOutput(io.Discard)
	input := bufio.NewReader(os.Stdin)
	for {
		line, err := input.ReadBytes('\n')
		if err != nil {
			return
		}
		var question struct {
			Filters []string
			Fields  map[string]string
		}
		if err := json.Unmarshal(line, &question); err != nil {
			fmt.Println(err)
			continue
		}
		filter, err := filters.ParseAll(question.Filters...)
		if err != nil {
			fmt.Println("null")
			continue
		}
		fmt.Println(filter.Match(filters.AdapterFunc(func(path []string) (string, bool) {
			value, ok := question.Fields[strings.Join(path, ".")]
			return value, ok
		})))
	}
}
